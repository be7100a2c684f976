"""Another adapter's weights in the place of one that is in the model: the same parameters with other values."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import nn

from ..checks import shown
from ..errors import SieveError
from ..moe.wrappers import innermost
from .methods import Method

_PREFIX = "base_model.model."
_ADVICE = "Use load_adapter and set_adapter instead."
# Settings that say what is in the weights beside factors.
_BESIDE = ("modules_to_save", "trainable_token_indices", "bias")


def swap_adapter(
    model: Any, method: Method, adapter_name: str, config: Any, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Give an adapter the weights and the configuration of another one.

    Args:
        method: of the adapter.
        config: of the weights.
        state_dict: as in a file; the keys may have the adapter's name in them.

    Raises:
        SieveError: it cannot take them; nothing was swapped.
    """
    model = innermost(model)
    held = model.peft_config[adapter_name]
    _check_settings(held, config, adapter_name)
    _check_unmerged(model, adapter_name)
    if method.check_hotswap is not None:
        method.check_hotswap(model, adapter_name, config, state_dict)
    prefix = _PREFIX if isinstance(model, PeftModel) else ""
    weights = {prefix + key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    try:
        # It checks all before it copies into the parameters that are there, which compiled code holds.
        set_peft_model_state_dict(model, weights, adapter_name)
    except KeyError as error:
        raise SieveError(f"The weights to swap in have no {error.args[0]}. {_ADVICE}") from error
    except SieveError as error:
        raise SieveError(
            f"The weights to swap in have other experts, ranks or modules than adapter '{adapter_name}'. {_ADVICE}"
        ) from error
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            rank = module.r[adapter_name]
            module.lora_alpha[adapter_name] = config.lora_alpha
            module.scaling[adapter_name] = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
    # Or the next save would describe the weights that are gone.
    model.peft_config[adapter_name] = copy.copy(config)
    model.peft_config[adapter_name].inference_mode = held.inference_mode


def _check_settings(held: Any, config: Any, adapter_name: str) -> None:
    for name in ("peft_type", *CONFIG_KEYS_TO_CHECK[held.peft_type], *_BESIDE):
        own, other = getattr(held, name, None), getattr(config, name, None)
        if _comparable(own) != _comparable(other):
            raise SieveError(
                f"The adapter to swap in has {name}={shown(other)}, and adapter '{adapter_name}' has {shown(own)}. "
                f"{_ADVICE}"
            )


def _comparable(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value or None


def _check_unmerged(model: nn.Module, adapter_name: str) -> None:
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise SieveError(f"Adapter '{adapter_name}' is merged and cannot be swapped. Call unmerge_adapter() first.")
