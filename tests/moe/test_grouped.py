"""Both implementations of the grouped product against one product a group, forward and backward."""

import pytest
import torch

from peft_sieve.moe.grouped import grouped_mm, kernel_usable
from tests.reference import assert_same


def _operands(dtype: torch.dtype, k: int, n: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 0, 5, 1]  # one group without rows
    x = torch.randn(sum(sizes), k, generator=generator, dtype=torch.float64).to(dtype)
    shape = (len(sizes), n, k) if transposed else (len(sizes), k, n)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, torch.tensor(sizes).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "k", "n", "kernel"),
    [
        (torch.float64, 8, 4, False),
        (torch.float32, 8, 4, True),
        (torch.float32, 8, 3, False),  # rows of 12 bytes
        (torch.float32, 6, 4, False),
        (torch.bfloat16, 16, 8, True),
        (torch.bfloat16, 16, 4, False),
        (torch.float16, 16, 8, True),
    ],
)
def test_product_and_gradients(dtype: torch.dtype, k: int, n: int, kernel: bool, transposed: bool) -> None:
    x, stored, offsets = _operands(dtype, k, n, transposed)
    weight = stored.transpose(1, 2) if transposed else stored
    assert kernel_usable(x, weight) == kernel
    x.requires_grad_()
    weight = weight.detach().requires_grad_()
    out = grouped_mm(x, weight, offsets)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(grad)

    starts = [0, *offsets.tolist()[:-1]]
    wide = torch.float64
    expected = torch.cat(
        [x[a:b].to(wide) @ weight[g].to(wide) for g, (a, b) in enumerate(zip(starts, offsets, strict=True))]
    )
    grad_x = torch.cat(
        [grad[a:b].to(wide) @ weight[g].to(wide).T for g, (a, b) in enumerate(zip(starts, offsets, strict=True))]
    )
    grad_w = torch.stack([x[a:b].to(wide).T @ grad[a:b].to(wide) for a, b in zip(starts, offsets, strict=True)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for actual, wanted, what in ((out, expected, "out"), (x.grad, grad_x, "x"), (weight.grad, grad_w, "weight")):
        assert actual.dtype == dtype
        assert_same(actual.detach(), wanted.detach(), what, rtol=tolerance, atol=tolerance)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight, offsets = _operands(torch.float64, 8, 4, False)
    x.requires_grad_()
    grouped_mm(x, weight, offsets).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_the_loop_can_be_asked_for() -> None:
    x, weight, offsets = _operands(torch.float32, 8, 4, False)
    assert_same(grouped_mm(x, weight, offsets, loop=True), grouped_mm(x, weight, offsets), "out", 1e-5, 1e-6)


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError, match="differs"):
        assert_same(torch.ones(2), torch.ones(2) * 1.1, "x")
    with pytest.raises(AssertionError, match="zero everywhere"):
        assert_same(torch.zeros(2), torch.zeros(2), "x")
