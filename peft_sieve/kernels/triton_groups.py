"""Products of groups of rows with small matrices, as Triton kernels: the low-rank updates of the adapted experts.

The rows of a group are consecutive. Ranges may be empty and may leave gaps, and their bounds stay on the device:
nothing here waits for it. No kernel uses atomics, so equal inputs give equal bits.

Triton is imported at the top: import this module only where Triton is known to be there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout

# Philox with seven rounds passes BigCrush; Triton's default of ten only takes longer.
_PHILOX_ROUNDS = tl.constexpr(7)


def multiply(
    x: torch.Tensor,
    matrices: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    *,
    alpha: float = 1.0,
    accumulate: bool = False,
    dropout: Dropout | None = None,
    drop_output: bool = False,
) -> None:
    """Multiply the rows of each group by its matrix: `out[start:end] = alpha * x[start:end] @ matrices[group]`.

    Rows of `out` outside all groups keep their values. Sums are taken in float32 and rounded once. Tensors may have any
    strides and be bfloat16, float16 or float32; `out` must not overlap the operands. Nothing is recorded for autograd.

    Args:
        x: rows, (rows, in).
        matrices: one matrix a group, (groups, in, n), rounded to the dtype of `x` if it has another.
        starts: first row of each group, int32, (groups,).
        ends: the row after the last of each group, int32, (groups,). Groups must not overlap.
        out: the result, (rows, n), of any of the three dtypes.
        alpha: factor on the product.
        accumulate: add to `out` instead of replacing it.
        dropout: which elements of `x` are zero; the others are scaled. Element (row, column) has the same fate in every
            matrix of the same width that is masked by `multiply` or `outer` with an equal `dropout`.
        drop_output: mask the product instead of `x`, before it is added to anything.
    """
    groups = starts.numel()
    (rows, k), n = x.shape, out.shape[1]
    _require_shapes(
        ("matrices", matrices, (groups, k, n)),
        ("out", out, (rows, n)),
        ("starts", starts, (groups,)),
        ("ends", ends, (groups,)),
    )
    if not out.numel() or not groups:
        return
    masks_output = dropout is not None and drop_output
    blocks = _multiply_blocks(x, matrices, n, masks_output)
    # A bound that needs no copy from the device: each group has at most one tile that is not full. Programs left over
    # return at once.
    row_tiles = triton.cdiv(rows, blocks["BLOCK_M"]) + groups
    with torch.cuda.device_of(x):
        sizes = ends - starts
        tile_ends = ((sizes + (blocks["BLOCK_M"] - 1)) // blocks["BLOCK_M"]).cumsum(0, dtype=torch.int32)
        _multiply_kernel[(row_tiles * triton.cdiv(n, blocks["BLOCK_N"]),)](
            x,
            matrices,
            out,
            starts.contiguous(),
            ends.contiguous(),
            tile_ends,
            groups,
            k,
            n,
            *x.stride(),
            *matrices.stride(),
            *out.stride(),
            *_scalars(alpha, dropout),
            ACCUMULATE=accumulate,
            DROP_X=dropout is not None and not drop_output,
            DROP_OUTPUT=masks_output,
            GROUPS_PADDED=triton.next_power_of_2(groups),
            **blocks,
        )


def outer(
    x: torch.Tensor,
    y: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    *,
    alpha: float = 1.0,
    dropout: Dropout | None = None,
) -> None:
    """Multiply the rows of two matrices, group by group: `out[group] = alpha * x[start:end].T @ y[start:end]`.

    Groups without rows give zeros. Dtypes, strides and sums are as in `multiply`.

    Args:
        x: rows, (rows, m).
        y: rows, (rows, n), rounded to the dtype of `x` if it has another.
        starts: first row of each group, int32, (groups,).
        ends: the row after the last of each group, int32, (groups,).
        out: the result, (groups, m, n).
        alpha: factor on the product.
        dropout: which elements of `y` are zero, as in `multiply`; the others are scaled.
    """
    groups = starts.numel()
    (rows, m), n = x.shape, y.shape[1]
    _require_shapes(
        ("y", y, (rows, n)), ("out", out, (groups, m, n)), ("starts", starts, (groups,)), ("ends", ends, (groups,))
    )
    if not out.numel():
        return
    blocks = _outer_blocks(x, y, dropout is not None)
    grid = (groups, triton.cdiv(m, blocks["BLOCK_M"]), triton.cdiv(n, blocks["BLOCK_N"]))
    with torch.cuda.device_of(x):
        _outer_kernel[grid](
            x,
            y,
            out,
            starts.contiguous(),
            ends.contiguous(),
            m,
            n,
            *x.stride(),
            *y.stride(),
            *out.stride(),
            *_scalars(alpha, dropout),
            DROP_Y=dropout is not None,
            **blocks,
        )


def _require_shapes(*expected: tuple[str, torch.Tensor, tuple[int, ...]]) -> None:
    # A kernel would read past the end.
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the other operands need {shape}.")


def _scalars(alpha: float, dropout: Dropout | None) -> tuple[float, float, int]:
    """Factor on the product, probability of zero, and seed. The scaling of the elements that stay is in the factor."""
    if dropout is None:
        return float(alpha), 0.0, 0
    return float(alpha * dropout.scale), float(dropout.p), dropout.seed


def _multiply_blocks(x: torch.Tensor, matrices: torch.Tensor, n: int, drop_output: bool) -> dict[str, int]:
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
    inner = min(_padded(k), inner_limit)
    # A single step has nothing to load ahead for.
    stages = max(1, min(3, triton.cdiv(k, inner)))
    return _blocks(rows, min(_padded(n), column_limit), inner, warps, stages)


def _outer_blocks(x: torch.Tensor, y: torch.Tensor, drop: bool) -> dict[str, int]:
    """As `_multiply_blocks`. The sum goes over rows here."""
    columns = min(_padded(y.shape[1]), 64)
    if x.dtype == torch.float32:
        return _blocks(min(_padded(x.shape[1]), 64), columns, 32, 8 if drop else 4, 3)
    inner = 32 if y.dtype == torch.float32 else 64
    return _blocks(min(_padded(x.shape[1]), 128), columns, inner, 4, 4)


def _blocks(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _padded(width: int) -> int:
    """The smallest tile that holds `width`; `tl.dot` takes none below 16."""
    return max(16, triton.next_power_of_2(width))


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
def _multiply_kernel(
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
def _outer_kernel(
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
