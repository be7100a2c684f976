"""Where in a checkpoint an adapter's matrices are added: each on the rows that hold its weight there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...errors import SieveError
from ..reading import OpenedAdapter
from .additions import Addition, additions_of, stacks_of
from .in_place import Edit
from .keys import CheckpointKeys
from .rows import Index, block_of, own_rows, row_maps, spellings


def edits_of(opened: OpenedAdapter, checkpoint: CheckpointKeys) -> dict[str, list[Edit]]:
    """Key of a checkpoint -> what is added to it.

    Raises:
        SieveError: the checkpoint has no weight that the adapter changes, or one of another shape.
    """
    skeletons, layers = spellings(opened.new_skeleton()), opened.moe_layers()
    by_block: dict[str, list[Addition]] = {}
    for addition in additions_of(opened):
        by_block.setdefault(block_of(addition.weight), []).append(addition)
    edits: dict[str, list[Edit]] = {}
    for block, additions in by_block.items():
        weights = {addition.weight: (addition.shape, addition.columns) for addition in additions}
        # Where one set of experts in a block is adapted, others may be needed to know its place.
        inside_block = [layer for layer in layers if layer.path.startswith(block)] if block else []
        stacks = {weight: stack for layer in inside_block for weight, stack in stacks_of(layer).items()}
        # The likeliest first; the last is for checkpoints that are in the model's own layout.
        layouts = [row_maps(s, {**stacks, **weights}, as_saved=saved) for s in skeletons for saved in (True, False)]
        layouts.append({weight: own_rows(weight, *layout) for weight, layout in weights.items()})
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
                edits.setdefault(checkpoint.key_of(stored.key), []).append(edit)
    return edits


def _add_rows(
    make_delta: Callable[[], torch.Tensor], columns: int, inside: Index, chosen: Index, weight: torch.Tensor
) -> None:
    """Add chosen rows of a matrix to the rows inside a weight, whose axis of columns is given."""
    rows = weight.movedim(columns, -1)
    delta = make_delta()[chosen]
    wide = torch.promote_types(weight.dtype, delta.dtype)
    rows[inside] = (rows[inside].to(wide) + delta.to(weight.device, wide)).to(weight.dtype)
