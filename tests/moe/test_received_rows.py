"""Dispatch read back from the rows that experts received."""

import pytest
import torch

from peft_sieve.moe.families.received_rows import dispatch_of, row_keys


def received(rows: torch.Tensor, choice: list[list[int]]) -> dict[int, torch.Tensor]:
    """What experts 0, 1, ... are given when they get the tokens named in `choice`."""
    return {expert: row_keys(rows[tokens]) for expert, tokens in enumerate(choice) if tokens}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_in_any_order_and_tokens_that_were_dropped(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = dispatch_of(row_keys(rows), received(rows, [[3, 0], [], [0, 4, 2], [0]]), 4)
    assert ids.tolist() == [[0, 2, 3], [4, 4, 4], [2, 4, 4], [0, 4, 4], [2, 4, 4]]


def test_equal_rows_each_count() -> None:
    rows = torch.randn(3, 8)
    rows = rows[[0, 1, 0, 2, 0]]
    ids = dispatch_of(row_keys(rows), received(rows, [[4, 2, 0], [1, 3], [3, 0, 1, 2, 4]]), 3)
    assert ids.tolist() == [[0, 2], [1, 2], [0, 2], [1, 2], [0, 2]]


def test_one_changed_bit_makes_another_row() -> None:
    rows = torch.randn(4, 16)
    changed = rows.clone()
    changed[2, 5] = torch.nextafter(changed[2, 5], torch.tensor(torch.inf))
    assert dispatch_of(row_keys(rows), received(changed, [[0, 1], [3]]), 2) is not None
    assert dispatch_of(row_keys(rows), received(changed, [[0, 1], [2, 3]]), 2) is None


def test_as_many_rows_as_there_are_and_none() -> None:
    rows = torch.randn(2, 1500, 4)  # more than are multiplied at once
    keys = row_keys(rows)
    assert keys.unique().numel() == 3000
    assert torch.equal(keys, row_keys(rows.reshape(-1, 4)))
    assert dispatch_of(keys, {0: keys.flip(0)}, 2).tolist() == [[0]] * 3000
    assert dispatch_of(keys[:2], {}, 2).shape == (2, 0)
