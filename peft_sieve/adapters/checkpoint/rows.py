"""Where the rows of a model's weights lie in its checkpoints, which may cut, join, interleave or transpose them.

transformers writes back weights that look like the model's, but have two columns and hold the numbers of their rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from ...checks import one_line
from ...errors import SieveError
from ..stack_layout import with_parameter

# What picks some rows of a tensor.
Index = tuple[int | slice | torch.Tensor, ...]

_COLUMNS = 2
_BLOCK = re.compile(r"(.*?\.)?\d+\.")


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint.

    Attributes:
        key: its name.
        columns: its axis of columns, that is of inputs.
        shape: of the other axes.
    """

    key: str
    columns: int
    shape: tuple[int, ...]

    def whole_shape(self, num_columns: int) -> tuple[int, ...]:
        return (*self.shape[: self.columns], num_columns, *self.shape[self.columns :])


# A weight of a checkpoint, places in it (columns last), and which of the rows asked for are there.
Place = tuple[StoredWeight, Index, Index]


class RowMap:
    """Where the rows of one weight of a model lie in a checkpoint. They are numbered as they follow in the weight."""

    def __init__(self, num_rows: int) -> None:
        self.weights: list[StoredWeight] = []
        self._weight_of = torch.full((num_rows,), -1)
        self._place_in_weight = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, key: str, columns: int, rows: torch.Tensor) -> None:
        """A weight of the checkpoint, and the numbers of its rows."""
        flat = rows.flatten()
        self._weight_of[flat] = len(self.weights)
        self._place_in_weight[flat] = torch.arange(flat.numel())
        self.weights.append(StoredWeight(key, columns, tuple(rows.shape)))

    def where(self, rows: torch.Tensor) -> list[Place]:
        """The weights that hold some rows; empty if the checkpoint does not have all of them."""
        weight_of = self._weight_of[rows]
        if (weight_of < 0).any():
            return []
        found: list[Place] = []
        for number in weight_of.unique().tolist():
            chosen = (weight_of == number).nonzero().squeeze(1)
            weight = self.weights[number]
            places = torch.unravel_index(self._place_in_weight[rows[chosen]], weight.shape)
            found.append((weight, tuple(_short(place) for place in places), (_short(chosen),)))
        return found


def row_numbers(shape: tuple[int, ...], columns: int) -> torch.Tensor:
    """A weight of some shape, but two columns wide, that holds the numbers of its rows."""
    rows = [size for axis, size in enumerate(shape) if axis != columns]
    numbers = torch.arange(torch.Size(rows).numel(), dtype=torch.float64).view(rows).unsqueeze(columns)
    return numbers.repeat_interleave(_COLUMNS, columns)


def block_of(weight: str) -> str:
    """The block of a model that a weight is in: all before the number and the number, or nothing."""
    match = _BLOCK.match(weight)
    return match.group() if match else ""


def own_rows(name: str, shape: tuple[int, ...], columns: int) -> RowMap:
    """For a checkpoint that has the weight as the model does."""
    numbers = row_numbers(shape, columns).select(columns, 0).long()
    rows = RowMap(numbers.numel())
    rows.add(name, columns, numbers)
    return rows


def row_maps(
    skeleton: PreTrainedModel, weights: dict[str, tuple[tuple[int, ...], int]], *, as_saved: bool = True
) -> dict[str, RowMap]:
    """Weight -> where its rows lie in the checkpoints of a model.

    Args:
        skeleton: the model on the meta device.
        weights: of one block (`block_of`), since the maps are as long as the weights: name -> shape, and the axis of
            columns. Some conversions need several of them at once.
        as_saved: a few conversions look at the shape first: they change what was published, and leave alone what
            transformers saved, which has the model's own. True: in the latter; False: in the former.

    Raises:
        SieveError: transformers converts weights of this model in a way that takes none with two columns.
    """
    probes, starts, maps = {}, [], {}
    total = 0
    for name, (shape, columns) in weights.items():
        probes[name] = row_numbers(shape, columns) + total
        starts.append(total)
        maps[name] = RowMap(probes[name].numel() // _COLUMNS)
        total += probes[name].numel() // _COLUMNS
    for name, probe in probes.items() if as_saved else ():
        skeleton = with_parameter(skeleton, name, probe)
    for key, value in reverted(skeleton, probes).items():
        for columns, rows in _rows_of(value):
            first = torch.bucketize(rows, torch.tensor(starts), right=True) - 1
            if (first == first.flatten()[0]).all():  # else it joins rows of several weights
                number = int(first.flatten()[0])
                maps[list(weights)[number]].add(key, columns, rows - starts[number])
    return maps


def _rows_of(value: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The axis of columns of a probe that was written back, and its rows' numbers; nothing if they are mixed up."""
    for axis in reversed(range(value.dim())):
        rows = value.select(axis, 0)
        if value.shape[axis] == _COLUMNS and torch.equal(rows, value.select(axis, 1)):
            yield axis, rows.long()
            return


def _short(places: torch.Tensor) -> int | slice | torch.Tensor:
    """Equal or evenly spaced places without a number for each."""
    values = places[:2].tolist()
    step = values[1] - values[0] if len(values) > 1 else 1
    if step == 0 and bool((places == values[0]).all()):
        return values[0]
    if step > 0 and torch.equal(places, values[0] + step * torch.arange(places.numel())):
        return slice(values[0], int(places[-1]) + 1, step)
    return places


def spellings(skeleton: PreTrainedModel) -> list[PreTrainedModel]:
    """A model as one that writes names without, and if there are such checkpoints, as one that writes them with the
    prefix of a model around it: a text model may be loaded from the checkpoint of one that sees, too."""
    conversions = get_model_conversion_mapping(skeleton, add_legacy=False)
    if not any(isinstance(conversion, PrefixChange) for conversion in conversions):
        return [skeleton]
    inside = copy.copy(skeleton)
    # As after loading such a checkpoint; without it, transformers writes no prefix.
    inside._weight_conversions = conversions  # type: ignore[assignment]
    return [skeleton, inside]


def reverted(skeleton: PreTrainedModel, probes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model under the names, and in the shapes, of its checkpoints.

    Raises:
        SieveError: transformers cannot write them back.
    """
    try:
        return revert_weight_conversion(skeleton, probes)
    except Exception as error:
        raise SieveError(
            f"transformers does not say where checkpoints of {type(skeleton).__name__} have {next(iter(probes))} and "
            f"others ({type(error).__name__}: {one_line(error)}). Pass layout='stacked', which does not need it, or "
            "call merge_and_unload() on the loaded model and save it."
        ) from error
