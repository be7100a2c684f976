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
from .experts.factors import BOOKKEEPING_KEY, OUTER_FACTORS, SLOTS_KEY, cold_in, experts_in, no_map, slots_of
from .loading import in_base_model, in_peft_model

_ADVICE = "Take both files from one save."
# With or without the adapter's name.
_SLOTS = re.compile(rf"{re.escape(BOOKKEEPING_KEY)}([^.]+\.)?slots$")
_OUTER = re.compile(rf"\.({'|'.join(OUTER_FACTORS)})\.([^.]+\.)?weight$")


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
        outer = {name: file.get_slice(name).get_shape() for name in file.keys() if _OUTER.search(name)}  # noqa: SIM118
    mask = content.get("selected_experts")
    cold_experts, share_outer = content.get("cold_experts", "frozen"), content.get("share_outer", False)
    if not isinstance(mask, Mapping) or cold_experts not in ("frozen", "shared") or not isinstance(share_outer, bool):
        return  # which the configuration refuses
    held = {in_base_model(_SLOTS.sub("", name)): value for name, value in slots.items()}
    shared = cold_experts == "shared"
    selected = {plain_name(path): ids for path, ids in mask.items()}
    for path in {**{path: ids for path, ids in selected.items() if ids or shared}, **held}:
        if path not in held:
            what = f"selects experts {selected[path]} there" if selected[path] else "has cold_experts='shared'"
            raise SieveError(
                f"{weights} has no {in_peft_model(path)}{SLOTS_KEY}, and {CONFIG_NAME} beside it {what}. Take both "
                "files from one save, with the names of tensors that it has."
            )
        _check_layer(weights, path, held[path], selected.get(path), shared)
    for name, shape in outer.items():
        path = in_base_model(_OUTER.sub("", name))
        num_slots = _num_slots(held[path], selected[path], shared) if path in held else 1
        if len(shape) == 3 and num_slots > 1 and shape[0] == (num_slots if share_outer else 1):
            raise SieveError(
                f"{weights} holds factors of {path} that were saved with share_outer={not share_outer}, and "
                f"{CONFIG_NAME} beside it has share_outer={share_outer}. {_ADVICE}"
            )


def _check_layer(weights: Path, path: str, slots: torch.Tensor, expected: Any, shared: bool) -> None:
    """Refuse the map of one layer that is not what the configuration says.

    Args:
        expected: the experts that are selected there; None if the layer is not in the mask.
        shared: whether the others use one adapter together.
    """
    found = _experts_of(slots, expected, shared)
    if found is None:
        raise no_map(weights)
    if found != expected:
        selects = [] if expected is None else expected
        raise SieveError(
            f"{weights} holds weights of experts {found} for {path}, and {CONFIG_NAME} beside it selects {selects}. "
            f"{_ADVICE}"
        )
    together = len(cold_in(slots)) if experts_in(slots) is not None else None
    if together is not None and together != (slots.numel() - len(found) if shared else 0):
        raise SieveError(
            f"{weights} {'does not hold' if shared else 'holds'} an adapter that the other experts of {path} share, "
            f"and {CONFIG_NAME} beside it has cold_experts='{'shared' if shared else 'frozen'}'. {_ADVICE}"
        )


def _num_slots(slots: torch.Tensor, experts: list[int], shared: bool) -> int:
    return len(experts) + (shared and len(experts) < slots.numel())


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
