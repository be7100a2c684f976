"""Which experts each strategy selects: on small numbers, and the published figures on the real telemetry of OLMoE."""

import inspect
import pickle
import random
import re
import warnings
from itertools import product
from statistics import fmean

import numpy as np
import pytest
import torch

from peft_sieve.errors import SieveError
from peft_sieve.routing.profile import RoutingProfile
from peft_sieve.routing.selection import select_experts
from peft_sieve.routing.strategies import STRATEGIES, SelectionOptions, experts_per_layer, validate_selection_options
from tests.routing.profiles import ANY_SCORE, profile_of


def test_table_2_count_and_mass_agree_on_the_hot_experts(olmoe):
    """Mean Jaccard 0.981 over ten data sets, of the mean over 16 layers, for the top 25%."""
    overlaps = [select_experts(p).jaccard(select_experts(p, score="mass")) for p in olmoe.values()]
    assert len(overlaps) == 10
    assert round(fmean(overlaps), 3) == 0.981


# fmt: off
TABLE_9_GREEDY = [15, 14, 16, 19, 16, 15, 17, 17, 15, 12, 15, 12, 15, 16, 20, 22]
TABLE_9_UNIFORM_COVERAGE = [
    48.5, 48.0, 52.8, 52.4, 57.5, 58.7, 66.6, 58.2, 60.5, 58.8, 55.4, 62.5, 60.3, 59.5, 51.0, 56.1,
]
TABLE_9_GREEDY_COVERAGE = [
    46.8, 44.5, 52.8, 57.8, 57.5, 56.9, 68.4, 60.0, 58.8, 51.9, 53.6, 55.7, 58.6, 59.5, 58.3, 67.7,
]
# fmt: on


def test_table_9_greedy_allocation_on_gsm8k(olmoe):
    profile = olmoe["gsm8k"]
    uniform, greedy = select_experts(profile), select_experts(profile, strategy="greedy")
    assert [len(experts) for experts in uniform.values()] == [16] * 16
    assert [len(experts) for experts in greedy.values()] == TABLE_9_GREEDY
    in_percent = [[100 * share for share in chosen.coverage(profile).values()] for chosen in (uniform, greedy)]
    assert [round(share, 1) for share in in_percent[0]] == TABLE_9_UNIFORM_COVERAGE
    assert [round(share, 1) for share in in_percent[1]] == TABLE_9_GREEDY_COVERAGE
    assert [round(fmean(shares), 1) for shares in in_percent] == [56.7, 56.8]


def test_greedy_is_never_below_uniform_and_costs_as_much(olmoe):
    for profile, score in product(olmoe.values(), ("count", "mass")):
        uniform, greedy = (select_experts(profile, strategy=name, score=score) for name in ("uniform", "greedy"))
        assert sum(map(len, greedy.values())) == sum(map(len, uniform.values())) == 256
        means = [fmean(chosen.coverage(profile, score).values()) for chosen in (uniform, greedy)]
        assert means[0] < means[1]


def test_coverage_reaches_its_target_with_the_fewest(olmoe):
    for profile, target in product(olmoe.values(), (0.2, 0.6, 0.95)):
        chosen = select_experts(profile, strategy="coverage", coverage=target)
        shares = chosen.coverage(profile)
        for layer, experts in chosen.items():
            assert shares[layer] >= target
            coldest = min(int(profile.counts[layer][expert]) for expert in experts)
            assert shares[layer] - coldest / int(profile.counts[layer].sum()) < target


def test_uniform_takes_the_highest_scores_of_each_layer_in_ascending_ids():
    chosen = select_experts(profile_of([1, 9, 3, 7], [8, 0, 0, 9]), top_k=2)
    assert dict(chosen) == {"layers.0": (1, 3), "layers.1": (0, 3)}


def test_the_score_decides():
    profile = profile_of([9, 1, 5, 0], mass=[[0.1, 2.0, 0.2, 0.0]])
    assert select_experts(profile, top_k=1)["layers.0"] == (0,)
    assert select_experts(profile, top_k=1, score="mass")["layers.0"] == (1,)


@pytest.mark.parametrize(
    ("num_experts", "top_k_frac", "expected"),
    [
        (64, 0.25, 16),
        (60, 0.25, 15),
        (8, 0.25, 2),
        (8, 0.01, 1),
        (8, 1, 8),
        (10, 0.25, 2),
        (14, 0.25, 4),
        (6, 0.25, 2),
    ],
)
def test_the_budget_is_the_rounded_share_and_at_least_one(num_experts, top_k_frac, expected):
    """Python's round: halves go to the even number (10 and 14 experts)."""
    assert experts_per_layer(num_experts, top_k_frac) == expected
    for strategy in ("uniform", "greedy", "random"):
        chosen = select_experts(profile_of(list(range(1, num_experts + 1))), top_k_frac=top_k_frac, strategy=strategy)
        assert len(chosen["layers.0"]) == expected


def test_top_k_wins_over_the_share():
    profile = profile_of([1, 2, 3, 4], [4, 3, 2])
    chosen = select_experts(profile, top_k=3, top_k_frac=0.25)
    assert dict(chosen) == {"layers.0": (1, 2, 3), "layers.1": (0, 1, 2)}


def test_layers_of_different_size_have_their_own_budget():
    chosen = select_experts(profile_of(list(range(8)), list(range(4))), top_k_frac=0.5)
    assert dict(chosen) == {"layers.0": (4, 5, 6, 7), "layers.1": (2, 3)}


@pytest.mark.parametrize("strategy", ["uniform", "greedy", "coverage"])
def test_ties_go_to_the_lower_id(strategy):
    """65 experts: long enough that an unstable sort would shuffle equal scores."""
    counts = [5] * 65
    counts[40] = 6
    mass = [[0.5] * 65]
    chosen = select_experts(profile_of(counts, mass=mass), top_k=4, strategy=strategy, coverage=21 / 326)
    assert chosen["layers.0"] == (0, 1, 2, 40)
    chosen = select_experts(profile_of(counts, mass=mass), top_k=4, strategy=strategy, coverage=4 / 65, score="mass")
    assert chosen["layers.0"] == (0, 1, 2, 3)


def test_counts_that_float64_cannot_tell_apart_are_told_apart():
    assert select_experts(profile_of([2**60, 2**60 + 1]), top_k=1)["layers.0"] == (1,)


def test_greedy_compares_shares_of_the_own_layer():
    """The second layer has far more tokens, but flatter ones: its shares are smaller."""
    profile = profile_of([4, 3, 2, 1], [1000, 1000, 999, 1001])
    assert dict(select_experts(profile, top_k=1, strategy="greedy")) == {"layers.0": (0,), "layers.1": (3,)}
    assert dict(select_experts(profile, top_k=2, strategy="greedy")) == {"layers.0": (0, 1), "layers.1": (0, 3)}
    assert dict(select_experts(profile_of([7, 3, 0, 0], [5, 5, 5, 5]), top_k=2, strategy="greedy")) == {
        "layers.0": (0, 1),
        "layers.1": (0, 1),
    }


def test_greedy_gives_equal_gains_to_the_earlier_layer():
    profile = RoutingProfile(counts={"late name": [2, 2], "early name": [2, 2], "c": [3, 1]})
    chosen = select_experts(profile, top_k=1, strategy="greedy")
    assert dict(chosen) == {"late name": (0,), "early name": (0,), "c": (0,)}
    profile = RoutingProfile(counts={"z": [1] * 4, "a": [1] * 4, "m": [97, 1, 1, 1]})
    assert [len(experts) for experts in select_experts(profile, top_k=2, strategy="greedy").values()] == [4, 1, 1]


def test_greedy_leaves_no_reached_layer_empty():
    """By shares alone the flat layer's experts (1/8 each) would all come after the steep layer's (1/3 each)."""
    profile = profile_of([1] * 8, [1, 1, 1])
    assert dict(select_experts(profile, top_k=1, strategy="greedy")) == {"layers.0": (0,), "layers.1": (0,)}
    chosen = select_experts(profile, top_k=2, strategy="greedy")
    assert dict(chosen) == {"layers.0": (0,), "layers.1": (0, 1, 2)}


def test_greedy_spends_its_whole_budget_on_cold_experts_if_it_must():
    profile = profile_of([5, 0, 0], [0, 5, 0])
    chosen = select_experts(profile, top_k=2, strategy="greedy")
    assert dict(chosen) == {"layers.0": (0, 1, 2), "layers.1": (1,)}


def test_coverage_on_small_numbers():
    profile = profile_of([5, 1, 3, 1], [0, 0, 9, 0])
    for target, expected in [(0.5, (0,)), (0.51, (0, 2)), (0.8, (0, 2)), (0.81, (0, 1, 2)), (1, (0, 1, 2, 3))]:
        chosen = select_experts(profile, strategy="coverage", coverage=target)
        assert dict(chosen) == {"layers.0": expected, "layers.1": (2,)}


def test_coverage_is_reached_at_exactly_the_target():
    """In binary 0.55 * 100 is above 55 and 0.1 + 0.2 is above 0.3: neither may cost an expert more."""
    assert select_experts(profile_of([45, 55]), strategy="coverage", coverage=0.55)["layers.0"] == (1,)
    masses = [[0.1] * 10]
    for k in range(1, 11):
        profile = profile_of([1] * 10, mass=masses)
        chosen = select_experts(profile, strategy="coverage", coverage=k / 10, score="mass")
        assert chosen["layers.0"] == tuple(range(k))


def test_small_masses_beside_a_large_one_are_not_lost():
    """Added up one by one, each 1.0 would vanish in 1e16 and the first expert alone would seem to be all."""
    profile = profile_of([1] * 3, mass=[[1e16, 1.0, 1.0]])
    assert select_experts(profile, strategy="coverage", coverage=1, score="mass")["layers.0"] == (0, 1, 2)


def test_coverage_needs_no_budget():
    profile = profile_of([1, 1, 1, 1])
    assert len(select_experts(profile, top_k=1, strategy="coverage", coverage=0.9)["layers.0"]) == 4


def test_random_is_fixed_for_all_platforms():
    """Written down once: a change of it would change users' control runs."""
    profile = RoutingProfile(counts={"model.layers.0.mlp.experts": [1] * 16, "model.layers.1.mlp.experts": [1] * 16})
    chosen = select_experts(profile, strategy="random", seed=0)
    assert dict(chosen) == {
        "model.layers.0.mlp.experts": (0, 6, 7, 9),
        "model.layers.1.mlp.experts": (4, 8, 12, 14),
    }


def test_random_depends_on_seed_and_layer_and_on_nothing_else():
    rows = [[1] * 64] * 2
    chosen = select_experts(profile_of(*rows), strategy="random", seed=1)
    assert all(len(experts) == 16 for experts in chosen.values())
    assert chosen["layers.0"] != chosen["layers.1"]
    assert chosen != select_experts(profile_of(*rows), strategy="random", seed=2)
    assert chosen == select_experts(profile_of(*[list(range(64))] * 2), strategy="random", seed=1)
    alone = select_experts(profile_of([1] * 64, layer_names=["layers.1"]), strategy="random", seed=1)
    assert alone["layers.1"] == chosen["layers.1"]


def test_random_ignores_and_keeps_the_global_generators():
    profile, results = profile_of([1] * 64), []
    for seed in (0, 123):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        results.append(select_experts(profile, strategy="random"))
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
    assert results[0] == results[1]


def test_random_draws_every_expert_equally_often():
    profile = profile_of([1] * 8)
    drawn = [select_experts(profile, strategy="random", top_k=2, seed=seed)["layers.0"] for seed in range(800)]
    times = [sum(expert in experts for experts in drawn) for expert in range(8)]
    assert min(times) > 150 and max(times) < 250  # 200 expected, standard deviation 12


@pytest.mark.parametrize("strategy", ANY_SCORE)
def test_a_selection_is_the_same_each_time_and_well_formed(olmoe, strategy):
    profile = olmoe["spider"]
    chosen = select_experts(profile, strategy=strategy)
    assert chosen == select_experts(pickle.loads(pickle.dumps(profile)), strategy=strategy)
    assert tuple(chosen) == profile.layer_names
    for experts in chosen.values():
        assert isinstance(experts, tuple) and all(type(expert) is int for expert in experts)
        assert list(experts) == sorted(set(experts)) and experts[0] >= 0 and experts[-1] < 64


@pytest.mark.parametrize("strategy", ANY_SCORE)
def test_a_layer_that_no_token_reached_is_empty_and_named(strategy):
    profile = profile_of([0, 0], [3, 1], [0, 0], mass=[[0, 0], [1.5, 0.5], [0, 0]])
    for score in ("count", "mass"):
        with pytest.warns(UserWarning) as caught:
            chosen = select_experts(profile, top_k=1, strategy=strategy, score=score)
        assert chosen["layers.0"] == chosen["layers.2"] == ()
        assert len(chosen["layers.1"]) == 1, "an unreached layer's budget is not spent elsewhere"
        assert tuple(chosen) == profile.layer_names
        (warning,) = caught
        assert str(warning.message).startswith("No token reached 'layers.0', 'layers.2', so")
        assert warning.filename == __file__


@pytest.mark.parametrize("strategy", ANY_SCORE)
def test_no_warning_when_every_layer_is_reached(strategy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_experts(profile_of([3, 1], [0, 1]), strategy=strategy)


@pytest.mark.parametrize("strategy", ANY_SCORE)
def test_a_profile_without_tokens_is_an_error(strategy):
    with pytest.raises(SieveError, match=r"No token reached any of the 2 layers.*calibration data"):
        select_experts(profile_of([0, 0], [0, 0]), strategy=strategy)


def test_a_layer_whose_score_is_zero_is_empty_and_told_from_an_unreached_one():
    profile = profile_of([1, 2], [1, 2], mass=[[0.0, 0.0], [1.0, 2.0]])
    with pytest.warns(UserWarning, match=r"No token with a mass above 0 reached 'layers.0'"):
        assert select_experts(profile, score="mass")["layers.0"] == ()


WRONG_OPTIONS = [
    *[
        ({"top_k_frac": value}, f"top_k_frac must be .*at most 1, got {re.escape(repr(value))}")
        for value in (0, 0.0, -0.25, 1.0001, 25, float("nan"), float("inf"), True, "0.25", None, [0.25], 1j)
    ],
    *[
        ({"coverage": value}, f"coverage must be .*at most 1, got {re.escape(repr(value))}")
        for value in (0, -1, 1.5, float("nan"), True, "0.6", None)
    ],
    *[
        ({"top_k": value}, f"top_k must be .*whole number.* or None, got {re.escape(repr(value))}")
        for value in (0, -3, 2.0, float("nan"), True, "2", [2])
    ],
    *[
        ({"strategy": value}, f"one of 'uniform', 'greedy', 'coverage', .*, got {re.escape(repr(value))}")
        for value in ("gredy", "Uniform", None, ["greedy"])
    ],
    *[
        ({"score": value}, f"one of 'count', 'mass', 'esft_gate', 'esft_token', got {re.escape(repr(value))}")
        for value in ("counts", 3)
    ],
]


DEFAULTS = {"top_k_frac": 0.25, "top_k": None, "strategy": "uniform", "score": "count", "coverage": 0.6}


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_options_are_refused_with_and_without_a_profile(options, message):
    for call in (
        lambda: validate_selection_options(**(DEFAULTS | options)),
        lambda: select_experts(profile_of([1, 2, 3, 4]), **options),
    ):
        with pytest.raises(SieveError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_good_options_are_accepted():
    assert validate_selection_options(**DEFAULTS) is None
    for strategy in ANY_SCORE:
        validate_selection_options(
            top_k_frac=np.float32(0.5), top_k=np.int64(3), strategy=strategy, score="mass", coverage=1
        )
    assert set(STRATEGIES) == {*ANY_SCORE, "cumulative"}
    profile = profile_of([1, 2, 3, 4])
    assert select_experts(profile, top_k=np.int64(2), top_k_frac=np.float32(1))["layers.0"] == (2, 3)


def test_a_saved_mask_may_be_of_a_score_that_is_not_registered_here():
    options = {"score": "of another program", "strategy": "cumulative", "top_p": 0.5}
    validate_selection_options(**options, check_scores=False)
    with pytest.raises(SieveError, match="score must be one of .*, got 'of another program'"):
        validate_selection_options(**options)
    for score in ("", 3, None):
        with pytest.raises(SieveError, match="score must be a non-empty string, got"):
            validate_selection_options(score=score, check_scores=False)
    with pytest.raises(SieveError, match="top_k must be"):
        validate_selection_options(top_k=0, check_scores=False)


def test_options_know_the_defaults_of_select_experts():
    defaults = {name: p.default for name, p in inspect.signature(select_experts).parameters.items()}
    del defaults["profile"]
    assert vars(SelectionOptions()) == defaults


def test_top_k_above_a_layers_experts_names_the_layer():
    profile = RoutingProfile(counts={"big": [1, 1, 1], "small": [1, 1]})
    with pytest.raises(SieveError, match=r"top_k must be at most 2.*layer 'small', got 3"):
        select_experts(profile, top_k=3)


@pytest.mark.parametrize("seed", [1.0, "0", None, True])
def test_the_seed_must_be_whole(seed):
    with pytest.raises(SieveError, match=f"seed must be a whole number, got {seed!r}"):
        select_experts(profile_of([1, 2]), seed=seed)


def test_a_profile_must_be_one():
    with pytest.raises(SieveError, match=r"must be a RoutingProfile, got 'profile.*RoutingProfile\.load"):
        select_experts("profile.safetensors")
