"""Sorting pairs by expert and putting them back, against transformers' own way."""

from __future__ import annotations

import pytest
import torch

from peft_sieve.kernels.dispatch import sort_by_expert

EXPERTS = 6


def ids(tokens: int = 50, top_k: int = 3) -> torch.Tensor:
    return torch.randint(0, EXPERTS, (tokens, top_k), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank_major", [False, True])
def test_pairs_are_sorted_by_expert(rank_major: bool) -> None:
    expert_ids = ids()
    dispatch = sort_by_expert(expert_ids, EXPERTS, rank_major)
    flat = (expert_ids.T if rank_major else expert_ids).reshape(-1)
    assert torch.equal(dispatch.expert_ids, flat.sort().values)
    assert torch.equal(flat[dispatch.order], dispatch.expert_ids)
    assert torch.equal(dispatch.counts, torch.bincount(flat, minlength=EXPERTS))
    token_of = torch.arange(50).repeat(3) if rank_major else torch.arange(50).repeat_interleave(3)
    assert torch.equal(dispatch.tokens, token_of[dispatch.order])
    assert torch.equal(dispatch.sort(expert_ids), dispatch.expert_ids)
    assert torch.equal(dispatch.unsort(dispatch.expert_ids), expert_ids)


@pytest.mark.parametrize("rank_major", [False, True])
def test_experts_may_come_in_another_order(rank_major: bool) -> None:
    """Ids of no expert, which some routers give for dropped tokens, stay behind."""
    expert_ids, order = ids(), [3, 0, 5, 1, 2, 4]
    expert_ids[7, 1] = EXPERTS + 2
    dispatch = sort_by_expert(expert_ids, EXPERTS, rank_major, order)
    counts = torch.bincount(expert_ids.reshape(-1), minlength=EXPERTS)
    expected = [expert for expert in order for _ in range(counts[expert])] + [EXPERTS + 2]
    assert dispatch.expert_ids.tolist() == expected
    assert dispatch.counts.tolist() == counts[:EXPERTS].tolist()
    assert torch.equal(dispatch.sort(expert_ids), dispatch.expert_ids)
    token_of = torch.arange(50).repeat(3) if rank_major else torch.arange(50).repeat_interleave(3)
    assert torch.equal(dispatch.tokens, token_of[dispatch.order])
    plain = sort_by_expert(expert_ids, EXPERTS, rank_major)
    for expert in range(EXPERTS):  # within an expert as before
        assert torch.equal(dispatch.order[dispatch.expert_ids == expert], plain.order[plain.expert_ids == expert])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 10, 16, 17, 22, 33])
def test_sums_have_the_bits_of_the_stock_forward(dtype: torch.dtype, top_k: int) -> None:
    """However they are made: reordered and summed over a dimension is what transformers does."""
    for width in (1, 31, 32, 64, 192, 257, 1000):
        dispatch = sort_by_expert(ids(40, top_k), EXPERTS)
        rows = torch.randn(40 * top_k, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        inverse = torch.empty_like(dispatch.order)
        inverse[dispatch.order] = torch.arange(inverse.numel())
        expected = rows[inverse].view(40, top_k, width).sum(dim=1)
        assert torch.equal(dispatch.sum_by_token(rows), expected), width


def test_no_tokens() -> None:
    dispatch = sort_by_expert(ids(0), EXPERTS)
    assert dispatch.counts.tolist() == [0] * EXPERTS
    assert dispatch.sum_by_token(torch.empty(0, 5)).shape == (0, 5)
