"""The mask in a configuration against the experts that saved weights belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ...errors import SieveError
from ...moe.wrappers import plain_name
from .experts.factors import SLOTS_KEY, experts_in
from .loading import check_state_dict, in_base_model


def check_saved_mask(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse a configuration whose mask is not that of the weights beside it.

    Args:
        content: of `adapter_config.json`.

    Raises:
        SieveError: it is not.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    with safe_open(weights, "pt") as file:
        slots = {name: file.get_tensor(name) for name in file.keys() if name.endswith(SLOTS_KEY)}  # noqa: SIM118
    mask = content.get("selected_experts")
    if not isinstance(mask, Mapping):
        return
    found = {in_base_model(name.removesuffix(SLOTS_KEY)): experts_in(value) for name, value in slots.items()}
    expected = {plain_name(path): ids for path, ids in mask.items() if ids}
    for path in {**expected, **found}:
        if found.get(path) != expected.get(path):
            raise SieveError(
                f"{weights} holds weights of experts {found.get(path, [])} for {path}, and {CONFIG_NAME} beside it "
                f"selects {expected.get(path, [])}. Take both files from one save."
            )


def check_hotswap(model: nn.Module, adapter_name: str, config: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse to put weights in the place of an adapter's when they have other experts, sizes or modules.

    Args:
        config: of the weights.
        state_dict: the weights, keys with adapter names.

    Raises:
        SieveError: and nothing was swapped.
    """
    configs: Any = model.peft_config
    held = configs[adapter_name]
    advice = "Use load_adapter and set_adapter instead."
    if any(c.expert_tuning != "lora" or c.hellori_density is not None for c in (config, held)):
        raise SieveError(f"Hot-swapping is not supported with expert_tuning='full' or a hellori_density. {advice}")
    if config.rank_pattern or config.alpha_pattern:
        raise SieveError(
            "Hot-swapping is not supported with a rank_pattern or an alpha_pattern: it sets one scaling everywhere. "
            f"{advice}"
        )
    inserted = re.compile(rf"(\.lora_\w+)\.{re.escape(adapter_name)}(?=\.|$)")
    given = {in_base_model(inserted.sub(r"\1", key)): value for key, value in state_dict.items()}
    try:
        check_state_dict(model, adapter_name, given, "lora_")
    except SieveError as error:
        raise SieveError(
            f"The weights to swap in have other experts, ranks or modules than adapter '{adapter_name}'. {advice}"
        ) from error
