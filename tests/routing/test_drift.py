"""Fresh counts against a mask, and the counting that goes on while a model trains."""

from __future__ import annotations

import math

import pytest
import torch

from peft_sieve import ExpertSelection, RoutingProfile, SieveError
from peft_sieve.routing.counting import DispatchCounter
from peft_sieve.routing.drift import routing_drift
from peft_sieve.routing.masks import token_mask
from peft_sieve.routing.selection import hottest_experts


def test_each_layer_is_compared_with_as_many_experts_as_it_has() -> None:
    profile = RoutingProfile.from_arrays([[4, 3, 2, 1], [0, 0, 9, 1], [0, 0, 0, 0]], layer_names=["a", "b", "c"])
    mask = ExpertSelection({"a": [0, 1, 3], "b": [3], "c": [0]})
    assert hottest_experts(profile, {"b": 1, "a": 3, "c": 1}).to_dict() == {"b": [2], "a": [0, 1, 2], "c": []}
    drift = routing_drift(profile, mask)
    # a: two of the four experts in either; b: none of two; c was not reached, and says nothing.
    assert drift.jaccard == pytest.approx((2 / 4 + 0) / 2)
    assert drift.coverage == pytest.approx((8 / 10 + 1 / 10) / 2)


def test_the_score_decides() -> None:
    profile = RoutingProfile.from_arrays([[5, 4, 1]], [[0.5, 4.0, 0.5]])
    mask = ExpertSelection({"layers.0": [1]})
    assert (routing_drift(profile, mask).jaccard, routing_drift(profile, mask).coverage) == (0.0, 0.4)
    by_mass = routing_drift(profile, mask, score="mass")
    assert (by_mass.jaccard, by_mass.coverage) == (1.0, 0.8)
    with pytest.raises(SieveError, match="score must be .*got 'mas'"):
        routing_drift(profile, mask, score="mas")


def test_without_traffic_there_is_no_drift() -> None:
    drift = routing_drift(RoutingProfile.from_arrays([[0, 0]]), ExpertSelection({"layers.0": [1]}))
    assert math.isnan(drift.jaccard) and math.isnan(drift.coverage)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3, 3), (1, 1, 3, 3)])
def test_counting_never_asks_for_a_value(shape: tuple[int, ...]) -> None:
    """Tensors on the meta device have none, and waiting for a device is asking for one."""
    counter = DispatchCounter(8)
    counter.real = token_mask(torch.ones(shape, device="meta"), {"input_ids": torch.ones(2, 3, device="meta")})
    for _ in range(2):
        counter.add(torch.zeros(6, 2, dtype=torch.long, device="meta"), torch.zeros(6, 2, device="meta"))
    with pytest.raises(RuntimeError):
        bool(counter.real.all())


def test_counting_stays_out_of_the_graph() -> None:
    counter = DispatchCounter(4)
    weights = torch.tensor([[0.75, 0.25], [1.0, 0.0]], requires_grad=True)
    counter.add(torch.tensor([[0, 1], [1, 4]]), weights * 1)
    counts, mass = counter.totals()
    assert counts.tolist() == [1, 2, 0, 0]
    assert mass.tolist() == [0.75, 1.25, 0.0, 0.0]
    assert not mass.requires_grad
