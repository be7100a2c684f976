"""In which pieces sorted rows go through the experts, and by which implementation of their products."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from ..errors import SieveError
from .grouped import DeviceGroups, Groups, LoopGroups

# torch.nn.functional.grouped_mm reads rows in units of this many bytes, and raises when a stride is not a multiple.
ALIGNMENT_BYTES = 16
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Which implementation runs, for finding out whether one of them is to blame for something.
BACKEND_VARIABLE = "PEFT_SIEVE_BACKEND"
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


def loop_chunks(counts: torch.Tensor, chunk_rows: int = CHUNK_ROWS) -> list[Chunk]:
    """Chunks of at least `chunk_rows` rows, except for the last; waits for the device.

    Args:
        counts: rows of each expert, (num_experts,).
    """
    chunks: list[Chunk] = []
    spans: list[tuple[int, int, int]] = []
    first = end = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            spans.append((expert, end - first, end - first + count))
            end += count
        if end - first >= chunk_rows:
            chunks.append(Chunk(slice(first, end), LoopGroups(spans, first)))
            spans, first = [], end
    if spans:
        chunks.append(Chunk(slice(first, end), LoopGroups(spans, first)))
    return chunks


def device_chunks(counts: torch.Tensor, num_rows: int) -> list[Chunk]:
    """All rows at once."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return [Chunk(slice(0, num_rows), DeviceGroups(ends - counts.to(torch.int32), ends))]


def device_groups_usable(stacks: Sequence[torch.Tensor]) -> bool:
    """Whether the GPU's kernels take these matrices, each (groups, in, out), and rows of their type.

    Raises:
        SieveError: the environment names no implementation, or one that is not installed.
    """
    choice = os.environ.get(BACKEND_VARIABLE, "auto")
    if choice not in ("auto", "loop", "device"):
        raise SieveError(
            f"{BACKEND_VARIABLE} is {choice!r}, expected auto, loop (any device) or device (a GPU with Triton): "
            "set one of these or leave it out"
        )
    if choice == "device" and not _has_triton():
        raise SieveError(
            f"{BACKEND_VARIABLE} is 'device' and Triton is not installed, expected it there: pip install triton, or "
            "leave the variable out"
        )
    if choice == "auto" and not _capable(stacks[0].device):
        return False
    return choice != "loop" and all(_kernel_takes(stack) for stack in stacks)


def _capable(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return _has_triton()


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernel_takes(stack: torch.Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes it, as it is and transposed, as in the backward."""
    if not hasattr(F, "grouped_mm") or stack.dtype not in _KERNEL_DTYPES:
        return False
    inner, outer = sorted(stack.stride()[1:])
    # Weights mapped from a file may start anywhere.
    starts_aligned = stack.data_ptr() % ALIGNMENT_BYTES == 0
    widths_aligned = all(_is_aligned(width, stack.dtype) for width in (*stack.shape[1:], outer))
    return inner == 1 and widths_aligned and starts_aligned


def _is_aligned(width: int, dtype: torch.dtype) -> bool:
    return width * dtype.itemsize % ALIGNMENT_BYTES == 0
