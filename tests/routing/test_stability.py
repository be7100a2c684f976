"""Agreement of selections, and of calibrations drawn from a profile, against all draws that there are."""

from __future__ import annotations

import statistics
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from peft_sieve import RoutingProfile, SieveError, selection_stability, subsample_stability


def test_layer_by_layer() -> None:
    first = RoutingProfile(counts={"a": [5, 4, 1, 0], "b": [1, 2, 3, 4], "c": [0, 0, 0, 0], "d": [1, 2, 0, 0]})
    second = RoutingProfile(counts={"a": [5, 1, 4, 0], "b": [0, 1, 8, 9], "c": [0, 0, 0, 0], "d": [0, 0, 1, 2]})
    with pytest.warns(UserWarning, match="No token reached 'c'"):
        assert selection_stability(first, second, top_k=2) == {"a": 1 / 3, "b": 1.0, "c": 1.0, "d": 0.0}
    with pytest.warns(UserWarning):
        assert selection_stability(first, second, top_k=1) == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}


def test_other_models_do_not_compare() -> None:
    with pytest.raises(SieveError, match="one of the two selections has 'a', 'b'"):
        selection_stability(RoutingProfile(counts={"a": [1, 2]}), RoutingProfile(counts={"b": [1, 2]}))


def test_the_mean_over_all_pairs_of_disjoint_draws() -> None:
    """Six tokens of one dispatch each; two calibrations of two. Draws that share tokens would agree more."""
    dispatches = [0, 0, 0, 1, 1, 2]

    def drawn(tokens: tuple[int, ...]) -> RoutingProfile:
        return RoutingProfile.from_arrays([np.bincount([dispatches[token] for token in tokens], minlength=3)])

    def mean(pairs: list[tuple[Any, Any]]) -> float:
        agreements = [selection_stability(drawn(one), drawn(other), top_k=1) for one, other in pairs]
        return statistics.fmean(value for agreement in agreements for value in agreement.values())

    draws = list(combinations(range(6), 2))
    disjoint = mean([(one, other) for one in draws for other in draws if not set(one) & set(other)])
    independent = mean([(one, other) for one in draws for other in draws])
    profile = RoutingProfile.from_arrays([np.bincount(dispatches)], num_experts_per_tok=1)
    (found,) = subsample_stability(profile, [2], repeats=1500, top_k=1)[2].values()
    assert abs(independent - disjoint) > 0.07
    assert found == pytest.approx(disjoint, abs=0.03)


def test_a_token_has_as_many_dispatches_as_the_router_gives_it() -> None:
    """Eight dispatches are two tokens of the top 4, so two calibrations of one token each."""
    profile = RoutingProfile.from_arrays([[3, 3, 1, 1]], num_experts_per_tok=4)
    assert list(subsample_stability(profile, [1], top_k=2)) == [1]
    with pytest.raises(SieveError, match="num_tokens must be at most 1, half of the tokens.*got 2"):
        subsample_stability(profile, [2])


def test_more_tokens_agree_more_and_sizes_do_not_depend_on_each_other(olmoe: dict[str, RoutingProfile]) -> None:
    profile = olmoe["gsm8k"]
    found = subsample_stability(profile, [2000, 100, 20_000], repeats=3, top_k=16)
    assert list(found) == [2000, 100, 20_000]
    assert all(list(layers) == list(profile.counts) for layers in found.values())
    few, more, many = (statistics.fmean(found[size].values()) for size in (100, 2000, 20_000))
    # Without knowledge, two draws of 16 of 64 agree by about 4 / 28.
    assert 1 / 7 < few < more < many < 1
    assert subsample_stability(profile, [100], repeats=3, top_k=16) == {100: found[100]}
    assert subsample_stability(profile, [100], repeats=3, seed=1, top_k=16) != {100: found[100]}


def test_counts_beyond_what_can_be_drawn_exactly() -> None:
    """They are halved until they can, for that layer only; a calibration may be as large as half of all tokens."""
    profile = RoutingProfile(
        counts={
            "large": [4 * 10**9, 10**9, 10**9 - 10**7, 7],
            "small": [500_000_000, 1000, 10, 0],
            "none": [0, 0, 0, 0],
        },
        num_experts_per_tok=1,
    )
    found = subsample_stability(profile, [10**6, 250_000_000], repeats=2, top_k=2)
    assert found[250_000_000] == {"large": 1.0, "small": 1.0}
    assert list(found[10**6]) == ["large", "small"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tokens": [0]}, "num_tokens must be .*whole number, got 0"),
        ({"num_tokens": [1.5]}, "num_tokens must be .*got 1.5"),
        ({"num_tokens": [True]}, "num_tokens must be .*got True"),
        ({"repeats": 0}, "repeats must be .*whole number, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"score": "mass"}, "score='mass' needs"),
        ({"top_k": 5}, "top_k must be at most 3.*got 5"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    profile = RoutingProfile.from_arrays([[5, 3, 2]], [[1.0, 1.0, 1.0]], num_experts_per_tok=1)
    with pytest.raises(SieveError, match=match):
        subsample_stability(profile, **{"num_tokens": [2], **options})


def test_profiles_that_cannot_be_drawn_from() -> None:
    with pytest.raises(SieveError, match="no num_experts_per_tok"):
        subsample_stability(RoutingProfile.from_arrays([[5, 3, 2]]), [1])
    with pytest.raises(SieveError, match="No token reached any layer"):
        subsample_stability(RoutingProfile.from_arrays([[0, 0]], num_experts_per_tok=1), [1])
    with pytest.raises(SieveError, match="RoutingProfile"):
        subsample_stability([[1, 2]], [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [10, "10"])
def test_sizes_are_a_list(sizes: Any) -> None:
    profile = RoutingProfile.from_arrays([[40, 20, 10, 10]], num_experts_per_tok=1)
    with pytest.raises(SieveError, match=f"num_tokens must be a list.*got {sizes!r}"):
        subsample_stability(profile, sizes)
