"""Adapters that are deleted, and which ones are active then: the same in every layer, and in modules trained whole.

PEFT lets each layer choose by itself, of the adapters that it has, and tells modules that are trained whole what the
first layer chose.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import SieveError


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    active: Sequence[str],
    configs: Mapping[str, Any],
    layer_class: type[BaseTunerLayer],
) -> list[str]:
    """Delete one adapter of a model; its configuration stays.

    Those of the active adapters that are left stay active, and as trainable as they were. If none is left, the first of
    the others becomes active, and trainable unless it was loaded for inference.

    Args:
        active: names of the active adapters.
        configs: of all adapters, by name.
        layer_class: the class of the layers that hold them.

    Returns:
        The names of the active adapters.

    Raises:
        SieveError: the adapter is merged; nothing was changed.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, layer_class)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise SieveError(
            f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    left = [name for name in configs if name != adapter_name]
    stay = [name for name in active if name != adapter_name]
    after = stay or left[:1] if adapter_name in active else stay
    if adapter_name in active and after:
        set_adapter(model, after, all(configs[name].inference_mode for name in after), layer_class)
    for layer in layers:
        layer.delete_adapter(adapter_name)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])
    if after == stay:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
    else:
        warnings.warn(f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {after[0]}.")
    return after
