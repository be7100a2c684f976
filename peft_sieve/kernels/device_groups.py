"""Products of row ranges that only the GPU knows, by Triton kernels and `torch.nn.functional.grouped_mm`.

Bounds stay on the device: nothing here waits for it. Sums are taken in float32 and rounded once. Operands and outputs
may have any strides and be bfloat16, float16 or float32.

Triton is imported at the top: import this module only where Triton is known to be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .groups import PLAIN, Groups, Late, ProductOptions, Slots
from .triton_kernels import multiply_kernel, outer_kernel


@dataclass(frozen=True)
class DeviceGroups(Groups):
    """Ranges known to the device only.

    Attributes:
        starts: first row of each group, int32, (groups,); ascending.
        ends: the row after the last of each group, int32, (groups,). Groups do not overlap.
        own: how many groups have a matrix of their own; the others use the one after those. None for all.
    """

    starts: Tensor
    ends: Tensor
    own: int | None = None

    def select(self, slots: Slots) -> DeviceGroups:
        return DeviceGroups(self.starts[slots.ids], self.ends[slots.ids], slots.own if slots.shared else None)

    def _parts(self, matrices: Tensor) -> Iterator[tuple[DeviceGroups, Tensor, bool]]:
        """The groups with a matrix of their own, and those that use one together; with each, their matrices, and
        whether it is one for all of them."""
        if self.own is None:
            yield self, matrices, False
            return
        self._require_shapes(("matrices", matrices, (self.own + 1, *matrices.shape[1:])))
        if self.own:
            yield DeviceGroups(self.starts[: self.own], self.ends[: self.own]), matrices[: self.own], False
        yield DeviceGroups(self.starts[self.own :], self.ends[self.own :]), matrices[self.own :], True

    def project(self, x: Tensor, matrices: Tensor) -> Tensor:
        return F.grouped_mm(x, matrices, offs=self.ends)

    def multiply(self, x: Tensor, matrices: Tensor, out: Tensor, options: ProductOptions = PLAIN) -> None:
        """As `Groups.multiply`; `out` must not overlap the operands, and matrices are rounded to the type of `x`."""
        for part, own, shared in self._parts(matrices):
            # One matrix for several groups has stride zero between them.
            part._multiply(x, own.expand(part.starts.numel(), -1, -1) if shared else own, out, options)

    def _multiply(self, x: Tensor, matrices: Tensor, out: Tensor, options: ProductOptions) -> None:
        groups = self.starts.numel()
        (rows, k), n = x.shape, out.shape[1]
        self._require_shapes(("matrices", matrices, (groups, k, n)), ("out", out, (rows, n)))
        if not out.numel() or not groups:
            return
        drop_output = options.dropout is not None and options.drop_output
        blocks = _multiply_blocks(x, matrices, n, drop_output)
        # A bound that needs no copy from the device: each group has at most one tile that is not full. Programs left
        # over return at once.
        row_tiles = triton.cdiv(rows, blocks["BLOCK_M"]) + groups
        with torch.cuda.device_of(x):
            sizes = self.ends - self.starts
            tile_ends = ((sizes + (blocks["BLOCK_M"] - 1)) // blocks["BLOCK_M"]).cumsum(0, dtype=torch.int32)
            multiply_kernel[(row_tiles * triton.cdiv(n, blocks["BLOCK_N"]),)](
                x,
                matrices,
                out,
                self.starts.contiguous(),
                self.ends.contiguous(),
                tile_ends,
                groups,
                k,
                n,
                *x.stride(),
                *matrices.stride(),
                *out.stride(),
                *_scalars(options),
                ACCUMULATE=options.accumulate,
                DROP_X=options.dropout is not None and not drop_output,
                DROP_OUTPUT=drop_output,
                GROUPS_PADDED=triton.next_power_of_2(groups),
                **blocks,
            )

    def outer(
        self, x: Tensor, y: Tensor, out: Tensor, options: ProductOptions = PLAIN, late: Late | None = None
    ) -> None:
        """As `Groups.outer`, whatever `out` holds to begin with; `y` is rounded to the type of `x`.

        All rows are in one chunk here, so nothing is added late.
        """
        for part, own, shared in self._parts(out):
            if not shared:
                part._outer(x, y, own, options)
            else:
                # A sum for each group, and those summed up: one program for all rows of a matrix would keep the others
                # waiting.
                sums = own.new_empty((part.starts.numel(), *own.shape[1:]), dtype=torch.float32)
                part._outer(x, y, sums, options)
                own.copy_(sums.sum(0, keepdim=True))

    def _outer(self, x: Tensor, y: Tensor, out: Tensor, options: ProductOptions) -> None:
        groups = self.starts.numel()
        (rows, m), n = x.shape, y.shape[1]
        self._require_shapes(("y", y, (rows, n)), ("out", out, (groups, m, n)))
        if not out.numel():
            return
        drop = options.dropout is not None
        blocks = _outer_blocks(x, y, drop)
        with torch.cuda.device_of(x):
            outer_kernel[(groups, triton.cdiv(m, blocks["BLOCK_M"]), triton.cdiv(n, blocks["BLOCK_N"]))](
                x,
                y,
                out,
                self.starts.contiguous(),
                self.ends.contiguous(),
                m,
                n,
                *x.stride(),
                *y.stride(),
                *out.stride(),
                *_scalars(options),
                DROP_Y=drop,
                **blocks,
            )

    def _require_shapes(self, *expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
        # A kernel would read past the end.
        for name, tensor, shape in (*expected, ("ends", self.ends, (self.starts.numel(),))):
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the other operands need {shape}.")


def _scalars(options: ProductOptions) -> tuple[float, float, int]:
    """Factor on the product, probability of zero, and seed."""
    dropout = options.dropout
    return float(options.factor), float(dropout.p) if dropout else 0.0, dropout.seed if dropout else 0


def _multiply_blocks(x: Tensor, matrices: Tensor, n: int, drop_output: bool) -> dict[str, int]:
    """Tile sizes and launch options, from shapes and dtypes alone. The tiles of all stages share less than 100 KB."""
    k, column_limit, inner_limit, warps = x.shape[1], 128, 64, 8
    # Tall tiles only where groups have the rows to fill them.
    rows = 128 if x.shape[0] >= 256 * matrices.shape[0] else 64
    if x.dtype == torch.float32:
        # Without tensor cores, operands go through registers: larger tiles spill.
        rows, column_limit, inner_limit, warps = 64, 64, 32, 4
    elif matrices.dtype == torch.float32:
        inner_limit = 32
    if drop_output:
        # The generator needs several registers an element.
        column_limit = 64
    inner = min(_tile_width(k), inner_limit)
    # A single step has nothing to load ahead for.
    stages = max(1, min(3, triton.cdiv(k, inner)))
    return _blocks(rows, min(_tile_width(n), column_limit), inner, warps, stages)


def _outer_blocks(x: Tensor, y: Tensor, drop: bool) -> dict[str, int]:
    """As `_multiply_blocks`. The sum goes over rows here."""
    columns = min(_tile_width(y.shape[1]), 64)
    if x.dtype == torch.float32:
        return _blocks(min(_tile_width(x.shape[1]), 64), columns, 32, 8 if drop else 4, 3)
    inner = 32 if y.dtype == torch.float32 else 64
    return _blocks(min(_tile_width(x.shape[1]), 128), columns, inner, 4, 4)


def _blocks(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _tile_width(width: int) -> int:
    """The smallest tile that holds `width`; `tl.dot` takes none below 16."""
    return max(16, triton.next_power_of_2(width))
