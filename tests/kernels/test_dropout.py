"""Positions to drop: at the right rate, independent, and the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from peft_sieve.kernels.dropout import Dropout, dropped_positions


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.05, 0.5, 0.95, 0.999])
def test_rate(p: float) -> None:
    count = 400_000
    positions = dropped_positions(Dropout(p, 3), 0, count)
    assert (positions.diff() > 0).all()
    assert len(positions) == 0 or (positions[0] >= 0 and positions[-1] < count)
    assert abs(len(positions) - count * p) < 5 * math.sqrt(count * p * (1 - p)) + 1


def test_neighbours_are_independent() -> None:
    """Also elements a fixed distance apart, as one column of consecutive rows is."""
    count, p = 1_000_000, 0.2
    mask = torch.zeros(count)
    mask[dropped_positions(Dropout(p, 5), 1, count)] = 1
    for lag in (1, 2, 3, 64, 512):
        both = float((mask[lag:] * mask[:-lag]).mean())
        assert abs(both - p * p) < 5 * math.sqrt(p * p / count), lag


def test_every_position_is_dropped_at_the_same_rate() -> None:
    hits = torch.zeros(20)
    for seed in range(4000):
        hits[dropped_positions(Dropout(0.3, seed), 0, 20)] += 1
    assert ((hits / 4000 - 0.3).abs() < 5 * math.sqrt(0.21 / 4000)).all()


def test_seeds_and_streams() -> None:
    first = dropped_positions(Dropout(0.3, 1), 2, 1000)
    assert torch.equal(first, dropped_positions(Dropout(0.3, 1), 2, 1000))
    for other in (
        dropped_positions(Dropout(0.3, 2), 2, 1000),
        dropped_positions(Dropout(0.3, 1), 3, 1000),
        dropped_positions(Dropout(0.3, 1 + 2**40), 2, 1000),
    ):
        assert not torch.equal(first, other)


def test_nothing_to_drop_from() -> None:
    assert dropped_positions(Dropout(0.5, 1), 0, 0).numel() == 0
