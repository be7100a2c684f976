"""Part of a batch that is ready for the model: some of its rows, and some of their tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..masks import token_mask

_ALL = slice(None)


def part_of(batch: Mapping[str, Any], rows: slice, tokens: slice = _ALL) -> dict[str, Any] | None:
    """The inputs of these rows, and of these tokens of them; None if one of the inputs is not laid out by rows.

    Args:
        batch: with `input_ids` of shape (batch, length).
        rows, tokens: which.
    """
    shape = tuple(batch["input_ids"].shape)
    parts = {key: _piece(key, value, shape, rows, tokens) for key, value in batch.items()}
    return None if any(part is NotImplemented for part in parts.values()) else parts


def _piece(key: str, value: Any, shape: tuple[int, ...], rows: slice, tokens: slice) -> Any:
    if type(value) is dict:  # masks for kinds of layers
        parts = {kind: _piece(key, item, shape, rows, tokens) for kind, item in value.items()}
        return NotImplemented if any(part is NotImplemented for part in parts.values()) else parts
    if not isinstance(value, Tensor):
        if not isinstance(value, list | tuple):
            return value
        return value[rows] if len(value) == shape[0] else NotImplemented
    if value.ndim == 0:
        return value
    if key == "position_ids" and value.ndim == 3:  # (3, batch, length): time, height, width
        return value[:, rows, tokens]
    if key == "position_ids" and len(value) == 1:  # (1, length): the same for all rows
        return value[:, tokens]
    if key == "attention_mask" and value.ndim == 4:
        kept = value if len(value) == 1 else value[rows]
        return kept[:, :, tokens, tokens]
    if len(value) != shape[0]:
        return NotImplemented
    return value[rows, tokens] if _by_token(key, value, shape) else value[rows]


def rows_alone(batch: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a batch, one by one and without the padding around them; None as for `part_of`."""
    ids = batch["input_ids"]
    real = token_mask(batch.get("attention_mask"), batch)
    rows = []
    for row, used in enumerate(torch.ones_like(ids) if real is None else real.view_as(ids)):
        places = used.nonzero().flatten().tolist()
        if places:
            rows.append(part_of(batch, slice(row, row + 1), slice(places[0], places[-1] + 1)))
    known = [row for row in rows if row is not None]
    return known if len(known) == len(rows) else None


def has_only_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether all inputs of a row are laid out by its tokens, or are one number for it."""
    shape = tuple(batch["input_ids"].shape)
    own = ("position_ids", "attention_mask")
    tensors = [(key, value) for key, value in batch.items() if isinstance(value, Tensor) and key not in own]
    return all(value.ndim < 2 or _by_token(key, value, shape) for key, value in tensors)


def _by_token(key: str, value: Tensor, shape: tuple[int, ...]) -> bool:
    # A decoder's tokens are others, also where they are as many.
    return tuple(value.shape[:2]) == shape and not key.startswith("decoder_")
