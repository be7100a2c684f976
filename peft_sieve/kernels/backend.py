"""Which implementation of the products runs: the loop on the host, or the GPU's kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import choice
from ..errors import SieveError

# Names the implementation, for finding out whether one of them is to blame for something.
BACKEND_VARIABLE = "PEFT_SIEVE_BACKEND"
# torch.nn.functional.grouped_mm reads rows in units of this many bytes, and raises when a stride is not a multiple.
_ALIGNMENT_BYTES = 16
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_groups_usable(stacks: Sequence[Tensor]) -> bool:
    """Whether the GPU's kernels take these matrices, each (groups, in, out), and rows of their type.

    Raises:
        SieveError: the environment names no implementation, or one that is not installed.
    """
    backend = os.environ.get(BACKEND_VARIABLE, "auto")
    choice(BACKEND_VARIABLE, backend, ("auto", "loop", "device"))
    if backend == "device" and not _has_triton():
        raise SieveError(f"{BACKEND_VARIABLE} is 'device', which needs Triton. Run `pip install triton`.")
    if backend == "auto" and not _capable(stacks[0].device):
        return False
    return backend != "loop" and all(_kernel_takes(stack) for stack in stacks)


def _capable(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _has_triton()


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernel_takes(stack: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes it, as it is and transposed, as in the backward."""
    if not hasattr(F, "grouped_mm") or stack.dtype not in _KERNEL_DTYPES:
        return False
    inner, outer = sorted(stack.stride()[1:])
    # Weights mapped from a file may start anywhere.
    starts_aligned = stack.data_ptr() % _ALIGNMENT_BYTES == 0
    widths_aligned = all(_is_aligned(width, stack.dtype) for width in (*stack.shape[1:], outer))
    return inner == 1 and widths_aligned and starts_aligned


def _is_aligned(width: int, dtype: torch.dtype) -> bool:
    return width * dtype.itemsize % _ALIGNMENT_BYTES == 0
