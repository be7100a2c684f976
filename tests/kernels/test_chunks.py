"""How sorted rows are cut into chunks."""

from __future__ import annotations

import pytest
import torch

from peft_sieve.kernels.chunks import loop_chunks


@pytest.mark.parametrize(
    ("chunk_rows", "expected"),
    [(1, [(0, 5), (5, 11), (11, 12)]), (6, [(0, 11), (11, 12)]), (100, [(0, 12)])],
)
def test_chunks_hold_whole_experts(chunk_rows: int, expected: list[tuple[int, int]]) -> None:
    chunks = loop_chunks(torch.tensor([5, 0, 6, 1]), chunk_rows)
    assert [(chunk.rows.start, chunk.rows.stop) for chunk in chunks] == expected
    assert loop_chunks(torch.tensor([0, 0])) == []


def test_experts_in_another_order() -> None:
    chunks = loop_chunks(torch.tensor([5, 0, 6, 1]), 6, order=[3, 0, 1, 2])
    assert [chunk.groups.spans for chunk in chunks] == [[(3, 0, 1), (0, 1, 6)], [(2, 0, 6)]]
