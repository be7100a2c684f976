"""Triton kernels for products of row ranges with small matrices: the low-rank updates of the adapted experts.

Ranges may be empty and may leave gaps. No kernel uses atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Philox with seven rounds passes BigCrush; Triton's default of ten only takes longer.
_PHILOX_ROUNDS = tl.constexpr(7)

# Triton acts on the annotation `tl.constexpr` alone. The others are for type checkers, and may only name parts of `tl`.


@triton.jit
def _load_tile(
    base: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bound: tl.tensor,
    column_bound: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
) -> tl.tensor:
    """A tile of a matrix, with zeros out of bounds."""
    inside = (rows < row_bound)[:, None] & (columns < column_bound)[None, :]
    return tl.load(_pointers(base, rows, columns, row_stride, column_stride), mask=inside, other=0.0)


@triton.jit
def _pointers(
    base: tl.tensor, rows: tl.tensor, columns: tl.tensor, row_stride: tl.tensor, column_stride: tl.tensor
) -> tl.tensor:
    # In 64 bits: a transposed view has long strides along its columns, too.
    return base + (rows.to(tl.int64) * row_stride)[:, None] + (columns.to(tl.int64) * column_stride)[None, :]


@triton.jit
def _drop(
    tile: tl.tensor, rows: tl.tensor, columns: tl.tensor, width: tl.tensor, p: tl.tensor, seed: tl.tensor
) -> tl.tensor:
    """Zero the elements of a tile that the mask of a matrix of this width leaves out."""
    # In 64 bits, both halves of which the generator takes up: the matrix may have more than 2**31 elements.
    positions = (rows.to(tl.int64) * width)[:, None] + columns[None, :]
    return tl.where(tl.rand(seed, positions, _PHILOX_ROUNDS) >= p, tile, 0.0)


@triton.jit(do_not_specialize=["seed"])
def multiply_kernel(
    x: tl.tensor,
    matrices: tl.tensor,
    out: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    tile_ends: tl.tensor,
    groups: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    x_row_stride: tl.tensor,
    x_column_stride: tl.tensor,
    group_stride: tl.tensor,
    matrix_row_stride: tl.tensor,
    matrix_column_stride: tl.tensor,
    out_row_stride: tl.tensor,
    out_column_stride: tl.tensor,
    alpha: tl.tensor,
    p: tl.tensor,
    seed: tl.tensor,
    ACCUMULATE: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_OUTPUT: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of the result: up to BLOCK_M rows of one group, BLOCK_N columns."""
    # Neighbours work on the same rows, which the cache then holds.
    column_tiles = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    columns = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    group_ids = tl.arange(0, GROUPS_PADDED)
    all_tile_ends = tl.load(tile_ends + group_ids, mask=group_ids < groups, other=2147483647)
    group = tl.sum((all_tile_ends <= tile).to(tl.int32), 0)
    if group >= groups:
        return
    start = tl.load(starts + group)
    end = tl.load(ends + group)
    first_tile = tl.load(tile_ends + group) - tl.cdiv(end - start, BLOCK_M)
    rows = start + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    matrix = matrices + group.to(tl.int64) * group_stride

    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, k, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        x_tile = _load_tile(x, rows, inner, end, k, x_row_stride, x_column_stride)
        if DROP_X:
            x_tile = _drop(x_tile, rows, inner, k, p, seed)
        matrix_tile = _load_tile(matrix, inner, columns, k, n, matrix_row_stride, matrix_column_stride)
        product = tl.dot(x_tile, matrix_tile.to(x_tile.dtype), product, input_precision="ieee")

    product *= alpha
    if DROP_OUTPUT:
        product = _drop(product, rows, columns, n, p, seed)
    if ACCUMULATE:
        product += _load_tile(out, rows, columns, end, n, out_row_stride, out_column_stride).to(tl.float32)
    inside = (rows < end)[:, None] & (columns < n)[None, :]
    pointers = _pointers(out, rows, columns, out_row_stride, out_column_stride)
    tl.store(pointers, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def outer_kernel(
    x: tl.tensor,
    y: tl.tensor,
    out: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    x_row_stride: tl.tensor,
    x_column_stride: tl.tensor,
    y_row_stride: tl.tensor,
    y_column_stride: tl.tensor,
    group_stride: tl.tensor,
    out_row_stride: tl.tensor,
    out_column_stride: tl.tensor,
    alpha: tl.tensor,
    p: tl.tensor,
    seed: tl.tensor,
    DROP_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of one group's result, summed over all rows of the group."""
    group = tl.program_id(0)
    x_columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    y_columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(starts + group)
    end = tl.load(ends + group)

    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        # Read as it is needed, transposed.
        x_tile = _load_tile(x, x_columns, rows, m, end, x_column_stride, x_row_stride)
        y_tile = _load_tile(y, rows, y_columns, end, n, y_row_stride, y_column_stride)
        if DROP_Y:
            y_tile = _drop(y_tile, rows, y_columns, n, p, seed)
        product = tl.dot(x_tile, y_tile.to(x_tile.dtype), product, input_precision="ieee")

    product *= alpha
    inside = (x_columns < m)[:, None] & (y_columns < n)[None, :]
    pointers = _pointers(
        out + group.to(tl.int64) * group_stride, x_columns, y_columns, out_row_stride, out_column_stride
    )
    tl.store(pointers, product.to(out.dtype.element_ty), mask=inside)
