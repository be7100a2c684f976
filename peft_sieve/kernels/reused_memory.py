"""Memory on the CPU that is used again, for large intermediate results.

The C library asks the kernel for every large block anew and gives it back at once, and the kernel hands it over page by
page, cleared: for tens of megabytes that takes longer than what is computed in them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that the next call in the same thread may give away again.

    On other devices PyTorch keeps memory for such use itself, so there it is a new tensor.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    block: Tensor | None = getattr(_kept, "block", None)
    if block is None or block.numel() < size:
        block = _kept.block = torch.empty(size, dtype=torch.uint8)
    return block[:size].view(dtype).view(shape)


def release() -> None:
    """Gives this thread's block back, which is otherwise kept at the size of the largest step."""
    _kept.__dict__.clear()
