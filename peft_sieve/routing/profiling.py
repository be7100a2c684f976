"""Run a model over calibration data and count what its routers dispatch."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import SieveError
from ..moe.topology import MoELayer, find_moe_layers
from .counting import DispatchCounter, token_mask, watching
from .data.batches import CalibrationData, calibration_batches, tokens_in
from .encoder_decoder import decoder_layers, with_decoder_inputs
from .profile import RoutingProfile
from .sample_averages import SampleAverages
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
    text that the encoder reads. Hooks, training mode and random state are restored, also after an exception.

    Args:
        model: a MoE model of transformers, or one around it (`PeftModel`).
        data: calibration data in any form that `SieveLoraConfig.calib_dataset` takes.
        tokenizer: a tokenizer or its name; None takes the one saved with the model, where text has to be read.
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
    rule = None if stability is None else StabilityRule(stability, selection or {}, seed)
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
    )
    if rule is None:
        profile = profile_batches(base, layers, calibration, progress=progress)
    else:
        profile = profile_until_stable(base, layers, calibration, rule, progress=progress).profile
    check_reached(profile)
    return profile


def check_model(model: Any) -> None:
    """Raise `SieveError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise SieveError(
            f"received {type(model).__name__} as the model, expected a loaded one: load it with "
            "AutoModelForCausalLM.from_pretrained, and pass that"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrappers; adapter layers stay in it."""
    if isinstance(model, PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def check_reached(profile: RoutingProfile) -> None:
    """Refuse a profile without a single dispatch.

    Raises:
        SieveError: no MoE layer was reached.
    """
    if not any(counts.any() for counts in profile.counts.values()):
        raise SieveError(
            f"the calibration data reached none of the {len(profile.counts)} MoE layers, expected tokens routed to "
            "experts: pass data that the part of the model with the MoE layers reads"
        )


def find_tokenizer(model: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer to read data with: the one given, the one of that name, or the one saved with the model.

    Returns None where none is needed or found; reading text then fails with a sentence that asks for one.
    """
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    name = tokenizer or getattr(model, "name_or_path", None)
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if tokenizer is not None:
            raise SieveError(
                f"the tokenizer {tokenizer!r} cannot be loaded ({str(error).splitlines()[0]}), expected the name or "
                "path of one: pass that, or the tokenizer itself"
            ) from error
        return None


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


class RoutingCounters:
    """Counts of all layers over many batches.

    Attributes:
        counters: layer path -> what to feed with the layer's dispatches.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer], advice: str | None = None) -> None:
        self.averages = {layer.path: SampleAverages(layer.num_experts) for layer in layers}
        said = {} if advice is None else {"advice": advice}
        self.counters = {
            layer.path: DispatchCounter(layer.num_experts, averages=self.averages[layer.path], **said)
            for layer in layers
        }
        self._in_decoder = decoder_layers(model, self.counters)

    def expect(self, batch: Mapping[str, Any], decoder_mask: torch.Tensor | None) -> None:
        """Say what the next forward reads.

        Args:
            batch: with `input_ids`, one sample a row.
            decoder_mask: as `attention_mask`, of the decoder of an encoder-decoder; None if all its tokens are real.
        """
        for path, counter in self.counters.items():
            counter.real = _real_tokens(decoder_mask if path in self._in_decoder else batch.get("attention_mask"))
            self.averages[path].num_rows = len(batch["input_ids"])

    def end_batch(self) -> None:
        """The forward is over."""
        for sums in self.averages.values():
            sums.end_batch()

    def profile(self, model: nn.Module, calibration: CalibrationData) -> RoutingProfile:
        """What was counted, while `model` read all of `calibration`."""
        totals = {path: counter.totals() for path, counter in self.counters.items()}
        means = {path: sums.means(calibration.num_samples) for path, sums in self.averages.items()}
        known = {path: pair for path, pair in means.items() if pair is not None}
        complete = len(known) == len(means)
        return RoutingProfile(
            counts={path: counts for path, (counts, _) in totals.items()},
            mass={path: mass for path, (_, mass) in totals.items()},
            num_tokens=calibration.num_tokens,
            num_experts_per_tok=max((counter.top_k for counter in self.counters.values()), default=0) or None,
            sample_share={path: share for path, (share, _) in known.items()} if complete else None,
            sample_mass={path: mass for path, (_, mass) in known.items()} if complete else None,
            num_samples=calibration.num_samples,
            metadata={
                "dataset": calibration.name,
                "fingerprint": calibration.fingerprint,
                "samples": calibration.num_samples,
                "tokens": calibration.num_tokens,
                "model": getattr(model, "name_or_path", "") or type(model).__name__,
            },
        )


def _counted(model: nn.Module, layers: list[MoELayer], calibration: CalibrationData, bar: tqdm) -> RoutingProfile:
    counted = RoutingCounters(model, layers)
    forward = _backbone(model)
    device = input_device(model)
    if device.type == "meta":
        raise SieveError(
            "the model has no weights (it is on the meta device), expected a loaded one to profile: load the weights, "
            "or pass selected_experts"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        warnings.warn(
            "Profiling runs on the CPU, where the model is, though there is a GPU: move the model there first."
        )
    watched = []
    for layer in layers:
        parent, _, name = layer.path.rpartition(".")
        parent_module = model.get_submodule(parent)
        watched.append((layer.family, getattr(parent_module, name), parent_module, counted.counters[layer.path].add))
    with _undisturbed(model), watching(watched):
        for batch in calibration.batches:
            batch, decoder_mask = with_decoder_inputs(model, batch)
            counted.expect(batch, decoder_mask)
            check_vocabulary(model, batch)
            forward(on_device(batch, device))
            counted.end_batch()
            bar.update(tokens_in(batch))
    return counted.profile(model, calibration)


def _real_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    """As `token_mask`, and None, too, if all tokens are real: here nobody minds waiting for the device."""
    real = token_mask(mask)
    return None if real is None or bool(real.all()) else real


def _backbone(model: nn.Module) -> Callable[[dict[str, Any]], None]:
    """A forward without the head."""
    backbone = getattr(model, "base_model", model)
    parameters = inspect.signature(backbone.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def forward(batch: dict[str, Any]) -> None:
        mask = batch.get("attention_mask")
        positions_wanted = "position_ids" in parameters and "position_ids" not in batch
        if positions_wanted and mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all()):
            # Left padding: a token's position is its place among the real ones.
            batch["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if takes_any or "use_cache" in parameters:
            batch["use_cache"] = False
        backbone(**batch)

    return forward


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its inputs; offloaded weights are on no device until they are used."""
    embeddings: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model  # type: ignore[operator]
    hook = getattr(embeddings, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    if execution_device is not None:
        return torch.device(execution_device)
    return next(embeddings.parameters()).device


def check_vocabulary(model: nn.Module, batch: dict[str, Any]) -> None:
    """Refuse token ids that the model has no embedding for, as those of another model's tokenizer may be.

    Raises:
        SieveError: there are such ids.
    """
    embeddings: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    ids = batch.get("input_ids")
    if type(embeddings) is not nn.Embedding or not isinstance(ids, torch.Tensor) or not ids.numel():
        return
    if int(ids.max()) >= embeddings.num_embeddings:
        raise SieveError(
            f"the calibration data has the token id {int(ids.max())}, expected ids below {embeddings.num_embeddings}, "
            "which the model has embeddings for: pass the model's own tokenizer (calib_tokenizer)"
        )


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors there."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _keeping_their_layout(model: nn.Module) -> list[nn.Module]:
    """bitsandbytes' 4-bit layers: in evaluation mode on a CPU, some versions rearrange their weights for good, and from
    then on no gradient passes through."""
    return [m for m in model.modules() if type(getattr(m, "weight", None)).__name__ == "Params4bit"]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and adapters; modes, adapters and random states come back."""
    modes = [(module, module.training) for module in model.modules()]
    adapters = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if any(module.merged for module, _ in adapters):
        raise SieveError(
            "the model has a merged adapter, expected the base weights for profiling: call unmerge_adapter() first"
        )
    python_state = random.getstate()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            for module in _keeping_their_layout(model):
                module.training = True
            for adapter, _ in adapters:
                # Not enable_adapters(False): that also changes which weights require gradients.
                adapter._disable_adapters = True
            yield
    finally:
        random.setstate(python_state)
        for module, training in modes:
            module.training = training
        for adapter, disabled in adapters:
            adapter._disable_adapters = disabled
