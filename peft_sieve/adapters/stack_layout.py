"""A stack of matrices read as the model reads its stack of experts."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..moe.topology import MoELayer

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def projections_in(layer: MoELayer, parameter: str) -> list[str]:
    """The projections whose weights a parameter of the experts module holds."""
    return [p for p in layer.shape.projections if layer.family.parameter_names(layer.experts, [p]) == [parameter]]


def parameter_of(layer: MoELayer, projection: str) -> str:
    """The parameter of the experts module that holds a projection."""
    return layer.family.parameter_names(layer.experts, [projection])[0]


def parameters_of(layer: MoELayer) -> list[str]:
    """The parameters of the experts module that hold its projections."""
    return layer.family.parameter_names(layer.experts, list(layer.shape.projections))


def is_stack(layer: MoELayer, parameter: str) -> bool:
    """Whether a parameter holds a matrix per expert, rather than one for all."""
    return layer.experts.get_parameter(parameter).dim() == 3


def is_transposed(layer: MoELayer, parameter: str) -> bool:
    """Whether a stack holds its matrices as (in, out)."""
    stack = layer.experts.get_parameter(parameter)
    matrix = layer.family.expert_weight(layer.experts, projections_in(layer, parameter)[0], 0)  # (out, in)
    return matrix.stride(1) != stack.stride(2)


def matrix_in(layer: MoELayer, stack: torch.Tensor, projection: str, expert: int) -> torch.Tensor:
    """One projection of one expert in a stack that is laid out as the model's: a view, (out, in).

    Args:
        stack: in place of the parameter that holds `projection`; its input width may be another.
    """
    experts = with_parameter(layer.experts, parameter_of(layer, projection), stack)
    return layer.family.expert_weight(experts, projection, expert)


def with_parameter(module: ModuleT, name: str, value: torch.Tensor) -> ModuleT:
    """A copy of a module that has another value in one parameter, however deep, and shares all the rest."""
    changed = copy.copy(module)
    first, _, rest = name.partition(".")
    if rest:
        inner = module.get_submodule(first)
        inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner
        changed._modules = {**module._modules, first: with_parameter(inner, rest, value)}
    else:
        changed._parameters = {**module._parameters, first: nn.Parameter(value, requires_grad=False)}
    return changed
