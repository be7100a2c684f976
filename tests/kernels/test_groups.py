"""Products over row ranges against one product a range in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_sieve.kernels.chunks import device_chunks, loop_chunks
from peft_sieve.kernels.dropout import Dropout
from peft_sieve.kernels.groups import ProductOptions, Slots
from peft_sieve.kernels.loop_groups import LoopGroups
from tests.reference import assert_same

ROWS, IN, OUT = 12, 8, 16
# Two gaps, a range of one row; matrix 1 has no rows.
SPANS = [(0, 1, 4), (2, 4, 9), (3, 10, 11)]
KINDS = pytest.mark.parametrize("kind", ["loop", "device"])


def ranges(kind: str) -> Any:
    if kind == "loop":
        return LoopGroups(SPANS)
    pytest.importorskip("triton")
    from peft_sieve.kernels.device_groups import DeviceGroups

    bounds = {group: (start, end) for group, start, end in SPANS}
    pairs = [bounds.get(group, (4, 4)) for group in range(4)]
    return DeviceGroups(*(torch.tensor(side, dtype=torch.int32) for side in zip(*pairs, strict=True)))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_multiply(kind: str, dtype: torch.dtype, accumulate: bool) -> None:
    if kind == "device" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    x, matrices = random(ROWS, IN, dtype=dtype), random(4, OUT, IN, dtype=dtype, seed=1).transpose(1, 2)
    before = random(ROWS, 2 * OUT, dtype=dtype, seed=2)
    out = before.clone()
    ranges(kind).multiply(x, matrices, out[:, ::2], ProductOptions(alpha=0.5, accumulate=accumulate))
    assert torch.equal(out[:, 1::2], before[:, 1::2])
    idle = [0, 9, 11]
    assert torch.equal(out[idle], before[idle])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for group, start, end in SPANS:
        expected = 0.5 * x[start:end].double() @ matrices[group].double()
        if accumulate:
            expected += before[start:end, ::2].double()
        assert_same(out[start:end, ::2], expected, f"range {group}", rtol=tolerance, atol=tolerance)


@KINDS
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_outer(kind: str, out_dtype: torch.dtype) -> None:
    x, y = random(ROWS, IN, dtype=torch.bfloat16), random(ROWS, OUT, dtype=torch.bfloat16, seed=1)
    out = torch.zeros(4, IN, OUT, dtype=out_dtype)
    ranges(kind).outer(x, y, out, ProductOptions(alpha=2.0))
    assert (out[1] == 0).all()
    for group, start, end in SPANS:
        expected = 2 * x[start:end].double().T @ y[start:end].double()
        assert_same(out[group], expected, f"range {group}", rtol=2e-2, atol=2e-2)


@KINDS
@pytest.mark.parametrize("own", [0, 2])
def test_one_matrix_for_several_experts(kind: str, own: int) -> None:
    """Products of all their rows with it, and one sum of outer products."""
    slots = Slots({2: 0, 1: 1, 0: own, 3: own}, torch.tensor([2, 1, 0, 3]), own) if own else None
    slots = slots or Slots({0: 0, 2: 0, 3: 0}, torch.tensor([0, 2, 3]), own)
    x, y, matrices = random(ROWS, IN), random(ROWS, OUT, seed=1), random(own + 1, IN, OUT, seed=2)
    groups = ranges(kind).select(slots)
    out, sums = torch.zeros(ROWS, OUT), torch.zeros(own + 1, IN, OUT)
    groups.multiply(x, matrices, out, ProductOptions(alpha=0.5))
    groups.outer(x, y, sums, ProductOptions(alpha=2.0))
    expected = torch.zeros(own + 1, IN, OUT)
    for expert, start, end in SPANS:
        slot = slots.of[expert]
        assert_same(out[start:end], 0.5 * x[start:end] @ matrices[slot], f"{expert}", rtol=1e-5, atol=1e-6)
        expected[slot] += 2 * x[start:end].T @ y[start:end]
    used = expected.flatten(1).any(1)
    assert used[own]
    assert_same(sums[used], expected[used], "sums", rtol=1e-5, atol=1e-6)
    assert not sums[~used].any()


@KINDS
def test_dropout_drops_the_same_in_all_products(kind: str) -> None:
    """The mask is read off products with the identity, and holds for the transposed uses of a backward."""
    groups, dropout = ranges(kind), Dropout(0.4, 2**40 + 7)
    ones, identity = torch.ones(ROWS, IN), torch.eye(IN).expand(4, IN, IN).contiguous()
    mask = torch.zeros(ROWS, IN)
    groups.multiply(ones, identity, mask, ProductOptions(dropout=dropout))
    inside = torch.tensor([row for _, start, end in SPANS for row in range(start, end)])
    share = (mask[inside] == 0).float().mean()
    assert 0.15 < share < 0.65
    assert torch.allclose(mask[inside][mask[inside] != 0], torch.tensor(1 / 0.6))

    product = torch.zeros(ROWS, IN)
    groups.multiply(ones, identity, product, ProductOptions(dropout=dropout, drop_output=True, accumulate=True))
    assert torch.equal(product, mask)

    y, out = random(ROWS, IN), torch.zeros(4, 2, IN)
    groups.outer(torch.ones(ROWS, 2), y, out, ProductOptions(dropout=dropout))
    for group, start, end in SPANS:
        assert_same(out[group, 0], (mask * y)[start:end].sum(0), f"range {group}", rtol=1e-5, atol=1e-6)

    other = torch.zeros(ROWS, IN)
    groups.multiply(ones, identity, other, ProductOptions(dropout=Dropout(0.4, 8)))
    assert not torch.equal(other, mask)


def test_each_row_of_a_dispatch_has_its_own_mask() -> None:
    """Chunks count their rows from 0, but the mask goes by the row of the whole."""
    masks = []
    for first_row in (0, 5):
        out = torch.zeros(5, IN)
        groups = LoopGroups([(0, 0, 5)], first_row)
        groups.multiply(torch.ones(5, IN), torch.eye(IN)[None], out, ProductOptions(dropout=Dropout(0.5, 3)))
        masks.append(out)
    assert not torch.equal(*masks)


def test_project_covers_all_rows() -> None:
    x, matrices = random(ROWS, IN), random(4, IN, OUT, seed=1)
    counts = torch.tensor([5, 0, 6, 1])
    expected = torch.cat([x[:5] @ matrices[0], x[5:11] @ matrices[2], x[11:] @ matrices[3]])
    parts = [chunk.groups.project(x[chunk.rows], matrices) for chunk in loop_chunks(counts, 4)]
    assert_same(torch.cat(parts), expected, "loop", rtol=1e-5, atol=1e-6)
    pytest.importorskip("triton")
    (whole,) = device_chunks(counts, ROWS)
    assert whole.rows == slice(0, ROWS)
    assert_same(whole.groups.project(x, matrices), expected, "kernel", rtol=1e-5, atol=1e-6)


def test_select_renumbers() -> None:
    chosen = Slots({2: 0, 3: 1}, torch.tensor([2, 3]), own=2)
    assert LoopGroups(SPANS).select(chosen).spans == [(0, 4, 9), (1, 10, 11)]
    # Matrix 2 is that of experts 0 and 3 together: neighbours make one range.
    together = Slots({2: 0, 1: 1, 0: 2, 3: 2}, torch.tensor([2, 1, 0, 3]), own=2)
    assert LoopGroups(SPANS).select(together).spans == [(2, 1, 4), (0, 4, 9), (2, 10, 11)]
    assert LoopGroups([(0, 0, 4), (3, 4, 6), (2, 6, 7)]).select(together).spans == [(2, 0, 6), (0, 6, 7)]
    device = ranges("device").select(chosen)
    assert (device.starts.tolist(), device.ends.tolist()) == ([4, 10], [9, 11])
