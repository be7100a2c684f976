"""In which pieces sorted rows go through the experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import Groups
from .loop_groups import LoopGroups

# Rows that one pass of the loop handles at least: what they go through then stays in the processor's cache.
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a dispatch that go through the experts together: all rows of some experts.

    Attributes:
        rows: which rows.
        groups: their ranges, one an expert, counted from the first of these rows.
    """

    rows: slice
    groups: Groups


def loop_chunks(counts: Tensor, chunk_rows: int = CHUNK_ROWS, order: Iterable[int] | None = None) -> list[Chunk]:
    """Chunks of at least `chunk_rows` rows, except for the last; waits for the device.

    Args:
        counts: rows of each expert, (num_experts,).
        order: in which the experts come; None is ascending.
    """
    rows_of = counts.tolist()
    chunks: list[Chunk] = []
    spans: list[tuple[int, int, int]] = []
    first = end = 0
    for expert in range(len(rows_of)) if order is None else order:
        count = rows_of[expert]
        if count:
            spans.append((expert, end - first, end - first + count))
            end += count
        if end - first >= chunk_rows:
            chunks.append(Chunk(slice(first, end), LoopGroups(spans, first)))
            spans, first = [], end
    if spans:
        chunks.append(Chunk(slice(first, end), LoopGroups(spans, first)))
    return chunks


def device_chunks(counts: Tensor, num_rows: int) -> list[Chunk]:
    """All rows at once; only where `backend.device_groups_usable`."""
    from .device_groups import DeviceGroups  # needs Triton, which is not installed everywhere

    ends = counts.cumsum(0, dtype=torch.int32)
    return [Chunk(slice(0, num_rows), DeviceGroups(ends - counts.to(torch.int32), ends))]
