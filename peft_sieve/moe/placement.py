"""Where weights are while nobody uses them: offloaded ones (accelerate's hooks) are on no device between forwards; of
sharded ones (FSDP2) each process has a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device
from accelerate.utils.modeling import has_offloaded_params
from peft.tuners.tuners_utils import onload_layer
from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of `module`, or of a module in it, come to a device only for their forward."""
    return any(has_offloaded_params(child) for child in module.modules())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps a part of each weight in each process, so that a forward is a collective operation."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes, wherever its weights are meanwhile."""
    for child in module.modules():
        if has_offloaded_params(child):
            hook: Any = child._hf_hook
            return torch.device(hook.execution_device)
    return first_tensor(module).device


def first_tensor(module: nn.Module) -> torch.Tensor:
    """Some weight of `module`: its first parameter, or for layers that keep packed weights in buffers, one of those."""
    return next(chain(module.parameters(), module.buffers()))


def computes_on(model: nn.Module) -> dict[str, torch.device]:
    """A device map of where the parts of a dispatched model compute."""
    main = execution_device(model)
    device_map = getattr(model, "hf_device_map", {"": "cpu"})
    return {name: main if device in ("cpu", "disk") else torch.device(device) for name, device in device_map.items()}


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """The weights of `module`, and of modules in it, are where it computes, for reading, and go back afterwards."""
    with ExitStack() as stack:
        for part in module.modules():
            if _is_away(part):
                stack.enter_context(align_module_device(part))
        yield


@contextmanager
def onloaded_for_change(layer: nn.Module) -> Iterator[None]:
    """The weights of an adapter layer's base layer are where it computes, and what is written to them stays."""
    if not _is_away(layer.get_base_layer()):  # type: ignore[operator]
        yield
        return
    with onload_layer(layer):
        yield


def _is_away(module: nn.Module) -> bool:
    return has_offloaded_params(module) and any(p.is_meta for p in module.parameters(recurse=False))


@contextmanager
def left_offloaded(model: nn.Module, device_map: dict[str, torch.device] | None = None) -> Iterator[None]:
    """Loaders of adapters, which would place the whole of an offloaded model anew, leave it as it is.

    Between forwards the base weights are out of reach, so what is placed anew has lost its values or its adapter.

    Args:
        model: the model that `hf_device_map` belongs to.
        device_map: what a loader is told instead; None for nothing.
    """
    attributes = vars(model)
    before = attributes.pop("hf_device_map", None)
    if device_map is not None:
        attributes["hf_device_map"] = device_map
    try:
        yield
    finally:
        attributes.pop("hf_device_map", None)
        if before is not None:
            attributes["hf_device_map"] = before
