"""Where in a checkpoint an adapter's matrices are added: each on the rows that hold its weight there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ...errors import SieveError
from ..reading import OpenedAdapter
from .additions import Addition, additions_of, stacks_of
from .in_place import Edit
from .rows import Index, Place, block_of, own_rows, row_maps


def edits_of(opened: OpenedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Edit]]:
    """Key of the checkpoint -> what is added to it.

    Args:
        shapes: of the weights in the checkpoint.

    Raises:
        SieveError: the checkpoint has no weight that the adapter changes, or one of another shape.
    """
    skeleton = opened.new_skeleton()
    by_block: dict[str, list[Addition]] = {}
    for addition in additions_of(opened):
        by_block.setdefault(block_of(addition.weight), []).append(addition)
    layers = opened.moe_layers()
    edits: dict[str, list[Edit]] = {}
    prefix = f"{skeleton.base_model_prefix}."

    def find(key: str) -> str | None:
        # A checkpoint of the model without its head, or with it, has the same weights under shorter or longer names.
        return next((k for k in (key, key.removeprefix(prefix), prefix + key) if k in shapes), None)

    for block, additions in by_block.items():
        weights = {addition.weight: (addition.shape, addition.columns) for addition in additions}
        # Where one set of experts in a block is adapted, others may be needed to know its place.
        inside_block = [layer for layer in layers if layer.path.startswith(block)] if block else []
        stacks = {weight: stack for layer in inside_block for weight, stack in stacks_of(layer).items()}
        mapped = partial(row_maps, skeleton, {**stacks, **weights})
        # The likeliest first; the last is for checkpoints that are in the model's own layout.
        layouts = [
            mapped(),
            mapped(as_saved=False),
            {weight: own_rows(weight, *layout) for weight, layout in weights.items()},
        ]
        for addition in additions:
            tried = [places for layout in layouts if (places := layout[addition.weight].where(addition.rows))]
            problems = [_problem(places, addition, find, shapes) for places in tried]
            if None not in problems:
                raise SieveError(f"The base model's checkpoint {problems[0]}. Pass that as base_model.")
            for stored, inside, chosen in tried[problems.index(None)]:
                key = find(stored.key)
                assert key is not None
                edits.setdefault(key, []).append(partial(_add_rows, addition.delta, stored.columns, inside, chosen))
    return edits


def _problem(
    places: list[Place],
    addition: Addition,
    find: Callable[[str], str | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> str | None:
    """What keeps a matrix from being added at these places, if anything."""
    for stored, _, _ in places:
        key = find(stored.key)
        if key is None:
            return (
                f"has no weight {stored.key!r}, which the adapter changes, so it is not that of the model that the "
                "adapter was trained on"
            )
        shape = stored.whole_shape(addition.shape[addition.columns])
        if shapes[key] != shape:
            return (
                f"has a weight of shape {shapes[key]} where the adapter adds {shape} ({key}), so it is not that of "
                "the adapter's base model"
            )
    return None


def _add_rows(
    make_delta: Callable[[], torch.Tensor], columns: int, inside: Index, chosen: Index, weight: torch.Tensor
) -> None:
    """Add chosen rows of a matrix to the rows inside a weight, whose axis of columns is given."""
    rows = weight.movedim(columns, -1)
    delta = make_delta()[chosen]
    wide = torch.promote_types(weight.dtype, delta.dtype)
    rows[inside] = (rows[inside].to(wide) + delta.to(weight.device, wide)).to(weight.dtype)
