"""Run a model over calibration data and count what its routers dispatch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import SieveError
from ..moe.placement import is_sharded
from ..moe.topology import MoELayer, find_moe_layers
from .counting import PaddingUnknown
from .data.batches import CalibrationData, calibration_batches, tokens_in
from .data.cutting import rows_alone
from .distributed import gathered, on_every_rank
from .encoder_decoder import is_encoder_decoder, with_decoder_inputs
from .layer_counters import RoutingCounters
from .model_inputs import backbone_forward, check_vocabulary, find_tokenizer, input_device, on_device
from .plain_model import check_model, undisturbed, unwrapped
from .profile import RoutingProfile
from .rejection import naming_inputs
from .until_stable import StabilityRule, StableProfile, profile_until


def profile_routing(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    max_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 8,
    formatting_func: Callable[[Any], Any] | None = None,
    progress: bool = True,
    split: str = "train",
    seed: int = 0,
    stability: float | None = None,
    selection: Mapping[str, Any] | None = None,
) -> RoutingProfile:
    """Count, for each MoE layer and expert, the tokens routed to it and the gate weight it received (MoE-Sieve §3).

    Runs the model's backbone, without its head, gradients or key-value cache, where and in the type the model is, and
    reads what the routers really dispatched. Padding and dropped slots do not count. Adapters on the model are switched
    off meanwhile. The decoder of an encoder-decoder reads the `labels` of batches that have some, and otherwise the
    text that the encoder reads. Hooks, training mode and random state are restored, also after an exception. Of a
    model that FSDP2 shards, all processes have to call it, each with its data, and the head runs, too.

    Args:
        model: a MoE model of transformers, or one around it (`PeftModel`).
        data: calibration data in any form that `SieveLoraConfig.calib_dataset` takes.
        tokenizer: a tokenizer, a processor or its name; None takes the one saved with the model, where text or images
            have to be read.
        max_samples: samples at most; of a larger data set, a subset drawn with `seed`.
        max_length: tokens per sample at most.
        batch_size: samples per forward.
        formatting_func: row -> text, for rows in another form.
        progress: show a bar with tokens per second if standard error is a terminal.
        split: split of a data set that has several.
        seed: of the subset, and of the order in which `stability` takes the batches.
        stability: None profiles all samples. A share in (0, 1] stops as soon as two halves of the samples so far select
            the same experts to at least this Jaccard similarity in every layer, and warns if that never happens. The
            profile's metadata then hold `stability`, layer name -> similarity reached.
        selection: with `stability`, the keyword arguments of `select_experts` that say what is selected; its defaults.

    Returns:
        The profile; layers are named by the path of their experts module.

    Raises:
        SieveError: no model, no MoE layer, unusable data, or no MoE layer reached by it.
    """
    check_model(model)
    rule = None if stability is None else StabilityRule(stability, {} if selection is None else selection, seed)
    base = unwrapped(model)
    layers = find_moe_layers(base)
    calibration = calibration_batches(
        data,
        tokenizer=find_tokenizer(base, tokenizer),
        formatting_func=formatting_func,
        split=split,
        max_samples=max_samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        image_dtype=getattr(base, "dtype", None),
    )
    if rule is None:
        profile = profile_batches(base, layers, calibration, progress=progress)
    else:
        profile = profile_until_stable(base, layers, calibration, rule, progress=progress).profile
    check_reached(profile)
    return profile


def profile_batches(
    model: nn.Module, layers: list[MoELayer], calibration: CalibrationData, *, progress: bool = True
) -> RoutingProfile:
    """As `profile_routing`, over batches that were made already; none of them need reach a layer."""
    with _bar(calibration, progress) as bar:
        return _counted(model, layers, calibration, bar)


def profile_until_stable(
    model: nn.Module,
    layers: list[MoELayer],
    calibration: CalibrationData,
    rule: StabilityRule,
    *,
    progress: bool = True,
    together: bool = False,
) -> StableProfile:
    """As `profile_batches`, until the rule is content.

    Args:
        together: whether all processes do this, each with its share, and stop together when their sum is stable.
    """
    with _bar(calibration, progress) as bar:
        return profile_until(rule, lambda part: _counted(model, layers, part, bar), calibration, together=together)


def _bar(calibration: CalibrationData, progress: bool) -> tqdm:
    # None: no bar unless a terminal is watching.
    hidden = None if progress else True
    return tqdm(total=calibration.num_tokens, desc="Profiling routing", unit="tok", unit_scale=True, disable=hidden)


def _counted(model: nn.Module, layers: list[MoELayer], calibration: CalibrationData, bar: tqdm) -> RoutingProfile:
    device = input_device(model)
    if device.type == "meta":
        raise SieveError(
            "The model is on the meta device and has no weights. Load them to profile it, or pass selected_experts."
        )
    if device.type == "cpu" and torch.cuda.is_available():
        warnings.warn(
            "Profiling runs on the CPU, where the model is, though there is a GPU: move the model there first."
        )
    counted = RoutingCounters(model, layers)
    forward = backbone_forward(model)
    extra = _extra_batches(model, calibration.batches)

    def read(batch: dict[str, Any]) -> None:
        batch, decoder_mask = with_decoder_inputs(model, batch)
        with counted.batch(batch, decoder_mask):
            check_vocabulary(model, batch)
            forward(on_device(batch, device))

    with undisturbed(model):
        with counted.watching(model):
            for batch in calibration.batches:
                with naming_inputs(batch, read):
                    try:
                        read(batch)
                    except PaddingUnknown:
                        rows = rows_alone(batch)
                        if rows is None or is_encoder_decoder(model) or is_sharded(model):
                            raise
                        for row in rows:
                            read(row)
                bar.update(tokens_in(batch))
        for batch in extra:
            forward(on_device(with_decoder_inputs(model, batch)[0], device))
    return counted.profile(model, calibration)


def _extra_batches(model: nn.Module, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What this process has to run, uncounted, because another has more batches: forwards of a sharded model are
    collective. Bad batches are refused before the first forward, in which the others would wait for this process.
    """
    if not is_sharded(model):
        return []

    def check() -> None:
        for batch in batches:
            check_vocabulary(model, batch)

    on_every_rank(check)
    most = max(gathered(len(batches)))
    some = [batch for first in gathered(batches[:1]) for batch in first]
    return some[:1] * (most - len(batches))


def check_reached(profile: RoutingProfile) -> None:
    """Refuse a profile without a single dispatch.

    Raises:
        SieveError: no MoE layer was reached.
    """
    if not any(counts.any() for counts in profile.counts.values()):
        raise SieveError(
            f"The calibration data reached none of the {len(profile.counts)} MoE layers. Pass data that the part of "
            "the model with these layers reads."
        )
