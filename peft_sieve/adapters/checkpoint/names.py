"""What the checkpoints of a base model call its weights, where transformers loads them under other names.

Servers and PEFT's loading of plain LoRA go by those names. transformers knows how to write a loaded model back; here
it writes back tiny tensors whose values say where they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel

from ...moe.topology import MoELayer
from ..stack_layout import is_stack, is_transposed, parameters_of, projections_in
from .rows import RowMap, block_of, reverted, row_maps

# (projection, expert) -> the name of that matrix, as a module of its own.
MatrixNames = dict[tuple[str, int], str]


def module_names(skeleton: PreTrainedModel, paths: Iterable[str]) -> dict[str, str]:
    """Module path -> the name that checkpoints have for it, which for most is the same.

    One whose weight is split in checkpoints, joined with others or transposed keeps its own name.

    Raises:
        SieveError: transformers cannot tell.
    """
    weights = {f"{path}.weight": path for path in paths}
    shapes = {weight: tuple(skeleton.get_parameter(weight).shape) for weight in weights}
    blocks: dict[str, list[str]] = {}
    for weight in weights:
        blocks.setdefault(block_of(weight), []).append(weight)
    maps: dict[str, RowMap] = {}
    for block in blocks.values():
        maps |= row_maps(skeleton, {weight: (shapes[weight], 1) for weight in block})
    names = {}
    for weight, path in weights.items():
        found = maps[weight].where(torch.arange(shapes[weight][0]))
        same = len(found) == 1 and found[0][0].key.endswith(".weight") and found[0][0].columns == 1
        names[path] = found[0][0].key.removesuffix(".weight") if same else path
    return names


def matrix_names(skeleton: PreTrainedModel, layers: list[MoELayer]) -> dict[str, MatrixNames]:
    """The names that checkpoints have for the experts' matrices, by the paths of layers.

    Layers are left out whose experts are in stacks in the checkpoints of this model, too.

    Args:
        layers: all that the model has: some conversions need several at once.

    Raises:
        SieveError: transformers cannot tell.
    """
    names = {layer.path: dict(layer.linears) for layer in layers if layer.linears}
    for name, alone, (layer, projection, expert) in _stored(skeleton, layers):
        if alone and name.endswith(".weight"):
            names.setdefault(layer.path, {})[projection, expert] = name.removesuffix(".weight")
    number = {layer.path: len(layer.shape.projections) * layer.num_experts for layer in layers}
    return {path: of_layer for path, of_layer in names.items() if len(of_layer) == number[path]}


def experts_names(skeleton: PreTrainedModel, layers: list[MoELayer]) -> dict[str, str]:
    """The name that checkpoints have for the module of all experts of a layer, by the paths of layers.

    Args:
        layers: all that the model has.

    Raises:
        SieveError: transformers cannot tell.
    """
    names = {layer.path: layer.experts_path for layer in layers}
    for name, alone, (layer, _, expert) in _stored(skeleton, layers):
        names[layer.path] = name.rpartition(f".{expert}." if alone and f".{expert}." in name else ".")[0]
    return names


def _stored(skeleton: PreTrainedModel, layers: list[MoELayer]) -> Iterator[tuple[str, bool, tuple[MoELayer, str, int]]]:
    """The names of the tensors in which checkpoints have the experts of stacks.

    Args:
        layers: all that the model has: some conversions need several at once.

    Returns:
        Name, whether the tensor is one matrix, and the first of its matrices (layer, projection, expert).
    """
    probes: dict[str, torch.Tensor] = {}
    matrices: list[tuple[MoELayer, str, int]] = []
    for layer in layers:
        stacked = layer.family.in_stacks and all(is_stack(layer, p) for p in parameters_of(layer))
        for parameter in parameters_of(layer) if stacked and not layer.linears else ():
            probes[f"{layer.experts_path}.{parameter}"] = _numbered(layer, parameter, len(matrices))
            matrices += [(layer, p, e) for e in range(layer.num_experts) for p in projections_in(layer, parameter)]
    for name, value in (reverted(skeleton, probes) if probes else {}).items():
        yield name, value.numel() == 1, matrices[int(value.flatten()[0])]


def _numbered(layer: MoELayer, parameter: str, first: int) -> torch.Tensor:
    """A stack with one row a projection, (num_experts, projections, 1) or as the model has it; rows are numbered."""
    rows = len(projections_in(layer, parameter))
    stack = first + torch.arange(layer.num_experts * rows).float().view(layer.num_experts, rows, 1)
    return stack.transpose(1, 2) if is_transposed(layer, parameter) else stack
