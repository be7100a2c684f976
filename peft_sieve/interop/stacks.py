"""A stack of matrices read as the model reads its stack of experts."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..moe.topology import MoELayer


def projections_in(layer: MoELayer, parameter: str) -> list[str]:
    """The projections whose weights a parameter of the experts module holds."""
    return [p for p in layer.shape.projections if layer.family.parameter_names(layer.experts, [p]) == [parameter]]


def parameter_of(layer: MoELayer, projection: str) -> str:
    """The parameter of the experts module that holds a projection."""
    return layer.family.parameter_names(layer.experts, [projection])[0]


def matrix_in(layer: MoELayer, stack: torch.Tensor, projection: str, expert: int) -> torch.Tensor:
    """One projection of one expert in a stack that is laid out as the model's: a view, (out, in).

    Args:
        stack: in place of the parameter that holds `projection`; its input width may be another.
    """
    parameter = parameter_of(layer, projection)
    experts = copy.copy(layer.experts)
    experts._parameters = {**layer.experts._parameters, parameter: nn.Parameter(stack, requires_grad=False)}
    return layer.family.expert_weight(experts, projection, expert)
