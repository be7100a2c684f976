"""Who loses blocks and who gets them, on numbers that can be followed by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from peft_sieve.tuners.epng.allocation import AllocationRule


def rule(**changes: Any) -> AllocationRule:
    return AllocationRule(**{"prune_ratio": 0.25, "grow_ratio": 0.25, "keep": 1, "capacity": 100, **changes})


def test_the_least_important_are_pruned_and_the_most_important_grow() -> None:
    importance = [5.0, 1.0, 7.0, 2.0, 9.0, 3.0, 8.0, 4.0]
    assert rule()(importance, dict.fromkeys(range(8), 4)) == {0: 4, 2: 4, 4: 8, 5: 4, 6: 8, 7: 4}


def test_blocks_are_dealt_in_turn_from_the_most_important_on() -> None:
    # Seven blocks for three: the first gets one more.
    found = rule(grow_ratio=0.5)([9.0, 0.0, 8.0, 7.0, 1.0, 2.0], {0: 4, 1: 3, 2: 4, 3: 4, 4: 4, 5: 4})
    assert found == {0: 4 + 3, 2: 4 + 2, 3: 4 + 2, 5: 4}


def test_only_adapted_experts_take_part() -> None:
    found = rule()([100.0, 3.0, 50.0, 2.0, 1.0, 0.0], {1: 2, 3: 2, 4: 2})
    assert found == {1: 4, 3: 2}


def test_of_equals_the_higher_id_is_pruned_and_the_lower_grows() -> None:
    assert rule()([1.0] * 4, dict.fromkeys(range(4), 2)) == {0: 4, 1: 2, 2: 2}


def test_what_has_no_room_goes_to_the_next_important() -> None:
    found = rule(capacity=6)([9.0, 8.0, 7.0, 0.0], dict.fromkeys(range(4), 4))
    assert found == {0: 6, 1: 6, 2: 4}


def test_fewer_are_pruned_where_there_is_no_room() -> None:
    # Two would free eight blocks and the other six have room for six: one is pruned.
    importance = [float(n) for n in range(8)]
    found = rule(capacity=5)(importance, dict.fromkeys(range(8), 4))
    assert found == {1: 4, 2: 4, 3: 4, 4: 5, 5: 5, 6: 5, 7: 5}


def test_nothing_moves_where_nothing_has_room_or_may_go() -> None:
    blocks = dict.fromkeys(range(4), 4)
    assert rule(capacity=4)([1.0, 2.0, 3.0, 4.0], blocks) == blocks
    assert rule(keep=4)([1.0, 2.0, 3.0, 4.0], blocks) == blocks
    assert rule()([1.0, 2.0], {1: 4}) == {1: 4}


@pytest.mark.parametrize("seed", range(20))
def test_the_sum_never_changes(seed: int) -> None:
    draw = random.Random(seed)
    number = draw.randint(2, 24)
    keep, capacity = draw.randint(1, number), draw.randint(6, 20)
    blocks = dict.fromkeys(sorted(draw.sample(range(32), number)), 5)
    total = sum(blocks.values())
    some = rule(prune_ratio=draw.random(), grow_ratio=draw.random(), keep=keep, capacity=capacity)
    for _ in range(12):
        before = blocks
        blocks = some([draw.random() for _ in range(32)], blocks)
        assert sum(blocks.values()) == total
        assert keep <= len(blocks) <= len(before)
        assert blocks.keys() <= before.keys()
        assert all(before[e] <= n <= capacity for e, n in blocks.items())


def test_who_has_more_than_the_capacity_keeps_it_and_does_not_grow() -> None:
    """Of a run with another `max_rank`."""
    found = rule(capacity=8)([9.0, 8.0, 7.0, 0.0], {0: 12, 1: 4, 2: 4, 3: 4})
    assert found == {0: 12, 1: 8, 2: 4}
    blocks = {0: 12, 1: 8, 2: 8, 3: 4}
    assert rule(capacity=8)([9.0, 8.0, 7.0, 0.0], blocks) == blocks
