"""Grouped matrix products: one small matrix per group of consecutive rows.

One function, `grouped_mm`, and behind it one implementation per backend: `torch.nn.functional.grouped_mm` wherever its
rules on dtype, stride and device are met, and a plain loop over the groups (any dtype, float64 included) elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# torch.nn.functional.grouped_mm reads rows in units of this many bytes, and raises when a stride is not a multiple.
ALIGNMENT_BYTES = 16
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, *, loop: bool = False) -> torch.Tensor:
    """Multiply each group of rows by its own matrix.

    Differentiable in `x` and `weight`; the gradient of a `weight` that does not require one is never formed.

    Args:
        x: rows sorted by group, shape (rows, in).
        weight: one matrix a group, shape (groups, in, out); a transposed view is fine.
        offsets: end of each group, int32, shape (groups,), non-decreasing; the last one must be `rows`.
        loop: one product a group even where the kernel would do, for the bits of an expert-at-a-time forward.

    Returns:
        Shape (rows, out).
    """
    if not loop and kernel_usable(x, weight):
        out = F.grouped_mm(x, weight, offs=offsets)
        if out.requires_grad:
            # The backward has the same rules, and a gradient may come as a strided or expanded view.
            out.register_hook(torch.Tensor.contiguous)
        return out
    return _GroupedMM.apply(x, weight, offsets)


def kernel_usable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes these operands, in the forward and in the backward."""
    if not hasattr(F, "grouped_mm") or x.dtype != weight.dtype or x.dtype not in _KERNEL_DTYPES:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    if x.device.type not in ("cuda", "cpu"):
        return False
    # The gradients of both operands are laid out by `in` and `out`, so both widths must be aligned too.
    widths_aligned = all(is_aligned_width(width, x.dtype) for width in weight.shape[1:])
    return widths_aligned and _is_aligned(x) and _is_aligned(weight)


def is_aligned_width(width: int, dtype: torch.dtype) -> bool:
    """Whether a row of `width` elements is a whole number of kernel units."""
    return width * dtype.itemsize % ALIGNMENT_BYTES == 0


def _is_aligned(tensor: torch.Tensor) -> bool:
    if tensor.stride(-1) == 1:
        leading = tensor.stride(-2)
    elif tensor.stride(-2) == 1:
        leading = tensor.stride(-1)
    else:
        return False
    # Weights mapped from a file may start anywhere.
    return is_aligned_width(leading, tensor.dtype) and tensor.data_ptr() % ALIGNMENT_BYTES == 0


class _GroupedMM(torch.autograd.Function):
    """The loop over groups, for what the kernel does not take. Only the gradients asked for are computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = _bounds(offsets)
        out = x.new_empty(x.shape[0], weight.shape[2])
        for group, (start, end) in ctx.bounds:
            torch.mm(x[start:end], weight[group], out=out[start:end])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for group, (start, end) in ctx.bounds:
            if grad_x is not None:
                torch.mm(grad[start:end], weight[group].T, out=grad_x[start:end])
            if grad_weight is not None:
                grad_weight[group] = x[start:end].T @ grad[start:end]
        return grad_x, grad_weight, None


def _bounds(offsets: torch.Tensor) -> list[tuple[int, tuple[int, int]]]:
    """(group, (start, end)) of every group that has rows; one device-to-host copy."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return [(group, pair) for group, pair in enumerate(zip(starts, ends, strict=True)) if pair[1] > pair[0]]
