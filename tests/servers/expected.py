"""What a server should compute for the experts of an adapter."""

from __future__ import annotations

from typing import Any

import torch

from tests.adapters.saved import Adapter

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def adapted_layers(adapter: Adapter) -> dict[int, Any]:
    """Index of the block -> the layer of expert adapters in it."""
    return {int(m.path.split(".")[2]): m for m in adapter.model.modules() if hasattr(m, "plans")}


def deltas(layer: Any) -> dict[str, torch.Tensor]:
    """Projection -> what is added to it in each expert, (experts, out, in), zeros for those without an adapter."""
    adapted, number = layer.plans["default"].adapted, layer.shape.num_experts
    found = {}
    for projection in PROJECTIONS:
        given = {e: layer.get_delta_weight("default", projection, e).detach() for e in adapted}
        zero = torch.zeros_like(next(iter(given.values())))
        found[projection] = torch.stack([given.get(e, zero) for e in range(number)])
    return found
