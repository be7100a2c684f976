"""What an adapter adds to the weights of its model: matrices, and the rows of which weights they belong to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora.layer import Conv2d, Embedding, LoraLayer, ParamWrapper, _ConvNd

from ...errors import SieveError
from ...moe.topology import MoELayer
from ...tuners.common.experts.layer import SieveExpertLayer
from ..reading import OpenedAdapter, lora_factors
from ..stack_layout import is_stack, is_transposed, matrix_in, parameter_of, parameters_of
from ..vocabulary import are_tied, embedding_modules
from .rows import row_numbers


@dataclass(frozen=True)
class Addition:
    """A matrix that an adapter adds to some rows of a weight.

    Attributes:
        weight: name of it in the model.
        shape, columns: of the weight, and its axis of columns.
        rows: numbers of the rows, in the order of the matrix.
        delta: makes the matrix, (rows, columns).
    """

    weight: str
    shape: tuple[int, ...]
    columns: int
    rows: torch.Tensor
    delta: Callable[[], torch.Tensor]


def additions_of(opened: OpenedAdapter) -> Iterator[Addition]:
    """All matrices that an adapter adds.

    Raises:
        SieveError: a weight is that of a convolution, or belongs to two places of the model.
    """
    skeleton = opened.new_skeleton()
    tied = embedding_modules(skeleton).keys() if are_tied(skeleton) else ()
    for path, layer in opened.other_layers():
        _refuse_what_is_no_matrix_of_its_own(path, layer, tied)
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        shape = tuple(layer.get_base_layer().get_parameter(parameter).shape)
        delta = partial(_lora_delta, layer, opened.name)
        yield Addition(f"{path}.{parameter}", shape, 1, torch.arange(shape[0]), delta)
    moe = {layer.path: layer for layer in opened.moe_layers()}
    for path, adapted in opened.expert_layers().items():
        yield from _of_experts(moe[path], adapted, opened.name)


def stacks_of(layer: MoELayer) -> dict[str, tuple[tuple[int, ...], int]]:
    """Weight with experts in it -> its shape, and its axis of columns; none if the experts are modules."""
    stacks = {}
    for parameter in [] if layer.linears else parameters_of(layer):
        shape = tuple(layer.experts.get_parameter(parameter).shape)
        columns = 1 if is_stack(layer, parameter) and is_transposed(layer, parameter) else len(shape) - 1
        stacks[f"{layer.experts_path}.{parameter}"] = shape, columns
    return stacks


def _of_experts(layer: MoELayer, adapted: SieveExpertLayer, name: str) -> Iterator[Addition]:
    plan, linears, stacks = adapted.plans[name], layer.linears, stacks_of(layer)
    numbers = {weight: row_numbers(shape, columns) for weight, (shape, columns) in stacks.items()}
    for projection, expert in itertools.product(plan.ranks, plan.adapted):
        delta: Callable[[], torch.Tensor] = partial(adapted.get_delta_weight, name, projection, expert)
        if linears:
            size_in, size_out = layer.shape.projections[projection]
            weight = f"{linears[projection, expert]}.weight"
            yield Addition(weight, (size_out, size_in), 1, torch.arange(size_out), delta)
            continue
        weight = f"{layer.experts_path}.{parameter_of(layer, projection)}"
        rows = matrix_in(layer, numbers[weight], projection, expert)
        if not torch.equal(rows[:, 0], rows[:, -1]):
            # Rows of the weight are columns of the matrix.
            rows, delta = rows.T, partial(_transposed, delta)
        yield Addition(weight, *stacks[weight], rows[:, 0].long(), delta)


def _transposed(delta: Callable[[], torch.Tensor]) -> torch.Tensor:
    return delta().T


def _lora_delta(layer: LoraLayer, name: str) -> torch.Tensor:
    """What a layer of PEFT's own adds to its weight."""
    a, b = (factor.cpu() for factor in lora_factors(layer, name))
    wide = torch.promote_types(a.dtype, torch.float32)
    delta = layer.scaling[name] * (b.to(wide) @ a.to(wide))
    return delta.T if isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False) else delta


def _refuse_what_is_no_matrix_of_its_own(path: str, layer: LoraLayer, tied: Container[str]) -> None:
    if isinstance(layer, Conv2d | _ConvNd):
        raise SieveError(
            f"The adapter is on the convolution {path}, and only linear layers and experts are merged into a "
            "checkpoint. Load the model, call merge_and_unload() and save it."
        )
    if path in tied or getattr(layer, "weight_is_shared", False):
        raise SieveError(
            f"The adapter is on {path}, whose weight is also that of another module, and a checkpoint has one weight "
            "for both. Load the model, call merge_and_unload() and save it."
        )
