"""Saved tensors of a layer of experts against the adapter that they are to be loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....errors import SieveError
from .factors import FACTOR_NAMES, OUTER_FACTORS, AdapterPlan, cold_in, experts_in, no_map

_ADVICE = "Load them under the configuration that they were saved with."


def check_saved_experts(layer: Any, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> None:
    """Refuse the tensors of other experts than those that the adapter has in a layer, or other factors of them.

    Args:
        layer: the `SieveExpertLayer`.
        saved: by attribute and key.

    Raises:
        SieveError: they are, or do not say whose they are.
    """
    _check_experts(layer, adapter_name, saved.get("lora_experts.slots"))
    factors = {name: saved[f"{name}.weight"] for name in FACTOR_NAMES if f"{name}.weight" in saved}
    for name in sorted(factors, key=OUTER_FACTORS.count):  # inner ones first: only those tell the number of slots
        _check_sharing(layer, adapter_name, name, factors[name])
    for name, value in factors.items():
        kept = getattr(layer, name)[adapter_name].kept
        # What HELLoRI does not train of a factor must be zero.
        if kept is not None and value.shape == kept.shape and bool(value.detach().cpu()[~kept.cpu()].any()):
            raise SieveError(
                f"The weights hold values in {layer.path}.{name}.weight outside the share that hellori_density and "
                f"hellori_seed of adapter '{adapter_name}' leave. {_ADVICE}"
            )


def _check_experts(layer: Any, adapter_name: str, slots: torch.Tensor | None) -> None:
    plan: AdapterPlan = layer.plans[adapter_name]
    if slots is None:
        raise SieveError(
            f"The checkpoint has no {layer.path}.lora_experts.slots for adapter '{adapter_name}', which says whose "
            "the factors are. Save or download the adapter again."
        )
    slots, of = slots.cpu(), layer.shape.num_experts
    found, expected = experts_in(slots), list(plan.experts)
    if found is None:
        raise no_map(layer.path)
    if slots.numel() != of or found != expected:
        raise SieveError(
            f"The weights belong to experts {found} of {slots.numel()} in {layer.path}, and adapter '{adapter_name}' "
            f"selects {expected} of {of}. Resume with the configuration of the checkpoint (its adapter_config.json), "
            "or start a new run."
        )
    if cold_in(slots) != list(plan.cold):
        raise _of_other_cold_experts(plan, layer.path, adapter_name)


def _check_sharing(layer: Any, adapter_name: str, name: str, value: torch.Tensor) -> None:
    """Refuse a factor with as many slots as it has under another `cold_experts` or `share_outer`."""
    plan: AdapterPlan = layer.plans[adapter_name]
    if plan.full or value.dim() != 3:
        return
    if name not in OUTER_FACTORS:
        others = len(plan.experts) < layer.shape.num_experts
        if others and len(value) == len(plan.experts) + (not plan.cold):
            raise _of_other_cold_experts(plan, layer.path, adapter_name)
    elif plan.num_slots > 1 and len(value) == (plan.num_slots if plan.share_outer else 1):
        raise SieveError(
            f"The weights in {layer.path} were saved with share_outer={not plan.share_outer}, and adapter "
            f"'{adapter_name}' has share_outer={plan.share_outer}. {_ADVICE}"
        )


def _of_other_cold_experts(plan: AdapterPlan, where: str, adapter_name: str) -> SieveError:
    saved_with, has = ("frozen", "shared") if plan.cold else ("shared", "frozen")
    return SieveError(
        f"The weights in {where} were saved with cold_experts='{saved_with}', and adapter '{adapter_name}' has "
        f"cold_experts='{has}'. {_ADVICE}"
    )
