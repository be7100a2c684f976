"""Where in a checkpoint an adapter's matrices are added: each on the rows that hold its weight there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ...errors import SieveError
from ..reading import OpenedAdapter
from .additions import Addition, additions_of, stacks_of
from .in_place import Edit
from .rows import Index, StoredWeight, block_of, own_rows, row_maps


def edits_of(opened: OpenedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Edit]]:
    """Key of the checkpoint -> what is added to it.

    Args:
        shapes: of the weights in the checkpoint.

    Raises:
        SieveError: the checkpoint has no weight that the adapter changes, or one of another shape.
    """
    skeleton, layers = opened.new_skeleton(), opened.moe_layers()
    checkpoint = _Checkpoint(shapes, f"{skeleton.base_model_prefix}.")
    by_block: dict[str, list[Addition]] = {}
    for addition in additions_of(opened):
        by_block.setdefault(block_of(addition.weight), []).append(addition)
    edits: dict[str, list[Edit]] = {}
    for block, additions in by_block.items():
        weights = {addition.weight: (addition.shape, addition.columns) for addition in additions}
        # Where one set of experts in a block is adapted, others may be needed to know its place.
        inside_block = [layer for layer in layers if layer.path.startswith(block)] if block else []
        stacks = {weight: stack for layer in inside_block for weight, stack in stacks_of(layer).items()}
        mapped = partial(row_maps, skeleton, {**stacks, **weights})
        # The likeliest first; the last is for checkpoints that are in the model's own layout.
        own = {weight: own_rows(weight, *layout) for weight, layout in weights.items()}
        layouts = [mapped(), mapped(as_saved=False), own]
        for addition in additions:
            tried = [places for layout in layouts if (places := layout[addition.weight].where(addition.rows))]
            problems = [checkpoint.problems(addition, [stored for stored, _, _ in places]) for places in tried]
            if [] not in problems:
                raise SieveError(
                    f"The base model's checkpoint {problems[0][0]}. Pass the checkpoint of the model that the adapter "
                    "was trained on as base_model."
                )
            for stored, inside, chosen in tried[problems.index([])]:
                edit = partial(_add_rows, addition.delta, stored.columns, inside, chosen)
                edits.setdefault(checkpoint.key_of(stored), []).append(edit)
    return edits


@dataclass(frozen=True)
class _Checkpoint:
    """The weights of a checkpoint: their shapes by key."""

    shapes: Mapping[str, tuple[int, ...]]
    prefix: str  # of the keys that a model with its head has for the model without

    def key_of(self, stored: StoredWeight) -> str:
        """The key of a weight, "" if it is not there. It may be that of the model without its head, or with it."""
        keys = (stored.key, stored.key.removeprefix(self.prefix), self.prefix + stored.key)
        return next((key for key in keys if key in self.shapes), "")

    def problems(self, addition: Addition, weights: list[StoredWeight]) -> list[str]:
        """What keeps a matrix from being added to these weights."""
        found = []
        for stored in weights:
            shape, wanted = self.shapes.get(self.key_of(stored)), stored.whole_shape(addition.shape[addition.columns])
            if shape is None:
                found.append(f"has no weight {stored.key!r}, which the adapter changes")
            elif shape != wanted:
                found.append(f"has a weight of shape {shape} where the adapter adds {wanted} ({stored.key})")
        return found


def _add_rows(
    make_delta: Callable[[], torch.Tensor], columns: int, inside: Index, chosen: Index, weight: torch.Tensor
) -> None:
    """Add chosen rows of a matrix to the rows inside a weight, whose axis of columns is given."""
    rows = weight.movedim(columns, -1)
    delta = make_delta()[chosen]
    wide = torch.promote_types(weight.dtype, delta.dtype)
    rows[inside] = (rows[inside].to(wide) + delta.to(weight.device, wide)).to(weight.dtype)
