"""The model itself: without PEFT's wrappers, and for the time of a block without training mode and adapters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..checks import must_be
from ..errors import SieveError
from ..moe.wrappers import innermost, uncompiled


def check_model(model: Any) -> None:
    """Raise `SieveError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise must_be("model", "a loaded model", model, "Load it with AutoModelForCausalLM.from_pretrained.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of PEFT, `torch.compile` and data parallelism; adapter layers stay in
    it."""
    inner = innermost(model)
    if isinstance(inner, PeftModel):
        inner = inner.base_model
    elif isinstance(inner, BaseTuner):
        inner = inner.model
    elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = inner.module
    return inner if inner is model else unwrapped(inner)


def _keeping_their_layout(model: nn.Module) -> list[nn.Module]:
    """bitsandbytes' 4-bit layers: in evaluation mode on a CPU, some versions rearrange their weights for good, and from
    then on no gradient passes through."""
    return [m for m in model.modules() if type(getattr(m, "weight", None)).__name__ == "Params4bit"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, adapters and compiled code; modes, adapters and random states come back.

    So does what models of images keep of their last prompt, for the tokens that they would generate next.
    """
    modes = [(module, module.training) for module in model.modules()]
    prompts = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    adapters = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if any(module.merged for module, _ in adapters):
        raise SieveError("The model has a merged adapter. Call unmerge_adapter() first.")
    python_state = random.getstate()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), uncompiled(model):
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
        for module, deltas in prompts:
            module.rope_deltas = deltas
        for adapter, disabled in adapters:
            adapter._disable_adapters = disabled
