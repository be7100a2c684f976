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
from .bookkeeping import scale_of
from .experts.factors import BOOKKEEPING_KEY, SLOTS_KEY, cold_in, experts_in, no_map, slots_of
from .loading import in_base_model, in_peft_model

# With or without the adapter's name.
_SLOTS = re.compile(rf"{re.escape(BOOKKEEPING_KEY)}([^.]+\.)?slots$")


def check_saved_mask(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse a configuration whose mask is not that of the weights beside it.

    Args:
        content: of `adapter_config.json`.

    Raises:
        SieveError: it is not.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    with safe_open(weights, "pt") as file:
        slots = {name: file.get_tensor(name) for name in file.keys() if _SLOTS.search(name)}  # noqa: SIM118
    mask = content.get("selected_experts")
    if not isinstance(mask, Mapping):
        return
    held = {in_base_model(_SLOTS.sub("", name)): value for name, value in slots.items()}
    shared = content.get("cold_experts") == "shared"
    expected = {plain_name(path): ids for path, ids in mask.items() if ids or shared}
    found = {path: _experts_of(value, expected.get(path), shared) for path, value in held.items()}
    for path in {**expected, **found}:
        if path not in found:
            raise SieveError(
                f"{weights} has no {in_peft_model(path)}{SLOTS_KEY}, and {CONFIG_NAME} beside it selects experts "
                f"{expected[path]} there. Take both files from one save, with the names of tensors that it has."
            )
        if found[path] is None:
            raise no_map(weights)
        if path not in expected or found[path] != expected[path]:
            raise SieveError(
                f"{weights} holds weights of experts {found[path]} for {path}, and {CONFIG_NAME} beside it "
                f"selects {expected.get(path, [])}. Take both files from one save."
            )
        others = held[path].numel() - len(expected[path])
        if experts_in(held[path]) is not None and len(cold_in(held[path])) != (others if shared else 0):
            raise SieveError(
                f"{weights} {'does not hold' if shared else 'holds'} an adapter that the other experts of {path} "
                f"share, and {CONFIG_NAME} beside it has cold_experts='{'shared' if shared else 'frozen'}'. Take both "
                "files from one save."
            )


def _experts_of(slots: torch.Tensor, expected: Any, shared: bool) -> list[int] | None:
    """Expert ids by slot, also of an average of adapters of the `expected` experts; None if these are no slots.

    Args:
        shared: whether the others use one adapter together.
    """
    found = experts_in(slots)
    if found is not None or not isinstance(expected, list):
        return found
    known = [expert for expert in expected if isinstance(expert, int) and 0 <= expert < slots.numel()]
    others = set(range(slots.numel())) - set(known) if shared else ()
    return known if known == expected and scale_of(slots, slots_of(slots.numel(), known, sorted(others))) else None


def check_hotswap(model: nn.Module, adapter_name: str, config: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse to put weights in the place of an adapter's that other experts use, or where one scaling everywhere does
    not say what they mean.

    Args:
        config: of the weights.
        state_dict: the weights.

    Raises:
        SieveError: and nothing was swapped.
    """
    configs: Any = model.peft_config
    held = configs[adapter_name]
    advice = "Use load_adapter and set_adapter instead."
    if any(c.expert_tuning != "lora" or c.hellori_density is not None for c in (config, held)):
        raise SieveError(f"Hot-swapping is not supported with expert_tuning='full' or a hellori_density. {advice}")
    for name in ("cold_experts", "share_outer"):
        own, other = getattr(held, name), getattr(config, name)
        if own != other:
            raise SieveError(
                f"The adapter to swap in has {name}={other!r}, and adapter '{adapter_name}' has {own!r}. {advice}"
            )
    if config.rank_pattern or config.alpha_pattern:
        raise SieveError(
            "Hot-swapping is not supported with a rank_pattern or an alpha_pattern: it sets one scaling everywhere. "
            f"{advice}"
        )
