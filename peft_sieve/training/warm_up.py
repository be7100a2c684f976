"""Count what the routers do while LoRA on all experts takes its first steps, instead of in a plain forward pass."""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..checks import share
from ..errors import SieveError
from ..hf.injection import Snapshot
from ..moe.topology import find_moe_layers
from ..moe.wrappers import uncompiled
from ..routing.data.batches import CalibrationData, calibration_batches, tokens_in
from ..routing.data.ready_batches import ModelBatches, is_model_batch
from ..routing.data.rows import read_row
from ..routing.data.sources import Choice, read_source
from ..routing.distributed import rank_and_world
from ..routing.encoder_decoder import IGNORED, decoder_mask
from ..routing.layer_counters import RoutingCounters
from ..routing.masks import token_mask
from ..routing.model_inputs import check_vocabulary, find_tokenizer, input_device, on_device
from ..routing.plain_model import check_model
from ..routing.profile import RoutingProfile
from ..routing.profiling import check_reached
from ..routing.rejection import naming_inputs
from ..tuners.sieve.config import SieveLoraConfig

_ADVICE = "Warm up with batch_size=1"


def warm_up_profile(
    model: nn.Module,
    data: Any,
    *,
    fraction: float = 0.1,
    config: SieveLoraConfig | None = None,
    learning_rate: float = 2e-4,
    tokenizer: Any = None,
    formatting_func: Callable[[Any], Any] | None = None,
    split: str = "train",
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> RoutingProfile:
    """Profile the routing during a short LoRA training on part of the data (HELLoRA, arXiv 2605.18795).

    Puts LoRA on all experts, trains it for one pass over `fraction` of the data with AdamW, counts what the routers
    dispatch in the forwards, and takes the adapter out again. The model's weights are those from before, bit for bit;
    training mode, what requires gradients, and random states come back, also after an exception.

    Args:
        model: a causal MoE model of transformers, without adapters, where it is to be trained.
        data: as for `profile_routing`, of known size: no iterators. Batches that are ready for the model may bring
            `labels`; otherwise all tokens have a loss.
        fraction: share of the samples, in (0, 1], drawn with `seed`; rounded up.
        config: the settings of LoRA, except for its experts, which are all, so that none is left for `cold_experts`;
            None is `SieveLoraConfig()`.
        learning_rate: of AdamW, constant, without weight decay.
        tokenizer: this and the next four as for `profile_routing`.
        formatting_func: row -> text, for rows in another form.
        split: the split to read, where there are several.
        max_length: tokens of a row; the rest is cut off.
        batch_size: rows of a step.
        seed: of the samples, their order, the adapter and its dropout.
        progress: show a bar if standard error is a terminal.

    Returns:
        The profile of the warm-up, for `hellora_config`; its metadata hold `warm_up`: fraction, steps, learning rate,
        and the loss of the first and the last step.

    Raises:
        SieveError: no MoE layer, unusable data, an adapter on the model, or several processes.
    """
    check_model(model)
    _check_warm_up(model, fraction, learning_rate)
    layers = find_moe_layers(model)
    everything = {layer.path: list(range(layer.num_experts)) for layer in layers}
    given = SieveLoraConfig() if config is None else config
    if type(given) is not SieveLoraConfig or given.selected_experts is not None or given.expert_tuning != "lora":
        raise SieveError(
            f"received config={reprlib.repr(given)} for the warm-up, expected a SieveLoraConfig without "
            "selected_experts and with expert_tuning='lora', since the warm-up trains all experts: pass one, or "
            "leave it out"
        )
    lora = replace(
        given,
        selected_experts=everything,
        calibration=None,
        expert_shapes=None,
        calib_dataset=None,
        calib_tokenizer=None,
        calib_formatting_func=None,
    )
    calibration = calibration_batches(
        data,
        tokenizer=find_tokenizer(model, tokenizer),
        formatting_func=formatting_func,
        split=split,
        max_samples=max(1, math.ceil(fraction * _number_of_samples(data, split, formatting_func))),
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        image_dtype=getattr(model, "dtype", None),
    )
    counted = RoutingCounters(model, layers, _ADVICE)
    with _with_adapter(model, lora, seed) as peft_model:
        losses = _trained(peft_model, model, calibration, counted, learning_rate, seed, progress)
    profile = counted.profile(model, calibration)
    check_reached(profile)
    warm_up = {"fraction": float(fraction), "steps": len(losses), "learning_rate": float(learning_rate)}
    warm_up |= {"first_loss": losses[0], "last_loss": losses[-1]}
    return replace(profile, metadata={**profile.metadata, "warm_up": warm_up})


def _trained(
    peft_model: PeftModel,
    model: nn.Module,
    calibration: CalibrationData,
    counted: RoutingCounters,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> list[float]:
    """One pass over the data; the loss of every step."""
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    device = input_device(model)
    order = torch.randperm(len(calibration.batches), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []

    def read(batch: dict[str, Any]) -> Any:
        with counted.batch(batch, decoder_mask(batch)):
            check_vocabulary(model, batch)
            return peft_model(**on_device(batch, device))

    bar = tqdm(total=calibration.num_tokens, desc="Warming up", unit="tok", unit_scale=True, disable=_hidden(progress))
    with bar, uncompiled(model):
        for index in order:
            batch = _with_labels(calibration.batches[index])
            # Not in the backward, where checkpointing computes again.
            with counted.watching(model), naming_inputs(batch, read):
                loss = read(batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.update(tokens_in(batch))
    return losses


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    if batch.get("labels") is not None:
        return dict(batch)
    labels, real = batch["input_ids"], token_mask(batch.get("attention_mask"), batch)
    if real is not None:
        labels = labels.masked_fill(~real.view_as(labels), IGNORED)
    return {**batch, "labels": labels}


@contextmanager
def _with_adapter(model: nn.Module, config: SieveLoraConfig, seed: int) -> Iterator[PeftModel]:
    """The model with a new adapter in training mode; afterwards it is as before."""
    before = Snapshot(model)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            peft_model = get_peft_model(model, config)
            peft_model.train()
            yield peft_model
    finally:
        before.restore()


def _number_of_samples(data: Any, split: str, formatting_func: Callable[[Any], Any] | None) -> int:
    if isinstance(data, str | os.PathLike):
        source = read_source(data, Choice(sys.maxsize, 0, split, all_columns=True))
        data = list(source.batches) if isinstance(source, ModelBatches) else source.rows
    if isinstance(data, Mapping) and split in data and not is_model_batch(data):
        data = data[split]
    if not hasattr(data, "__len__") or isinstance(data, Mapping):
        raise SieveError(
            f"received {type(data).__name__} as the data of the warm-up, expected data of known size, of which a "
            "fraction is used: pass a list or a datasets.Dataset"
        )
    first = data[0] if len(data) > 0 and hasattr(data, "__getitem__") else None
    if is_model_batch(first):
        return sum(len(batch["input_ids"]) for batch in ModelBatches(type(data).__name__, data).take(sys.maxsize))
    if formatting_func is None and isinstance(first, Mapping) and first.get("input_ids") is not None:
        # A packed row has several.
        return sum(len(read_row(row, f"row {position} of the data")) for position, row in enumerate(data))
    return len(data)


def _hidden(progress: bool) -> bool | None:
    # None: no bar unless a terminal is watching.
    return None if progress else True


def _check_warm_up(model: nn.Module, fraction: Any, learning_rate: Any) -> None:
    share("fraction", fraction)
    if (
        isinstance(learning_rate, bool)
        or not isinstance(learning_rate, int | float)
        or not 0 < learning_rate < math.inf
    ):
        raise SieveError(f"received learning_rate={learning_rate!r}, expected a number above 0: pass one such as 2e-4")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise SieveError(
            "the model has an adapter already, expected the base model, on which a temporary one is trained: warm up "
            "before get_peft_model, or call unload() first"
        )
    if rank_and_world()[1] > 1:
        raise SieveError(
            f"the warm-up was called in {rank_and_world()[1]} processes, expected one, since each would train an "
            "adapter of its own: warm up once, save the profile, and load it in every process"
        )
