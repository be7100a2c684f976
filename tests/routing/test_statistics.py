"""Routing skew: the definitions on small numbers, and the published figures on OLMoE's real telemetry."""

import math
from statistics import fmean

import pytest

from peft_sieve.errors import SieveError
from peft_sieve.routing.profile import RoutingProfile
from peft_sieve.routing.selection import select_experts
from peft_sieve.routing.statistics import routing_statistics

# --- the paper (MoE-Sieve, arXiv 2603.24044) ------------------------------------------------------------------------


def test_table_2_the_olmoe_row(olmoe):
    """Each figure is the mean over ten data sets of the mean over 16 layers; the ratio is of the two CVs."""
    measured = [routing_statistics(profile) for profile in olmoe.values()]
    assert len(measured) == 10
    global_cv = fmean(statistics.global_cv for statistics in measured)
    layer_cv = fmean(statistics.mean_layer_cv for statistics in measured)
    assert round(global_cv, 3) == 0.216
    assert round(layer_cv, 3) == 0.869
    assert round(layer_cv / global_cv, 1) == 4.0
    assert round(fmean(s.mean_layer_cv / s.global_cv for s in measured), 1) == 4.0
    assert round(100 * fmean(statistics.mean_cold_fraction for statistics in measured), 1) == 28.5
    assert round(100 * fmean(statistics.mean_coverage for statistics in measured), 1) == 53.0


# Table 7, OLMoE x Spider, as the notebook that the author published with the paper prints it
# (github.com/amanzoni1/MoE_Sieve, moe_sieve_companion.ipynb): layer, CV, cold %, coverage of the top 16 %, entropy.
# The notebook's CV takes the sample standard deviation (n - 1), ours and Table 2's the population's.
TABLE_7 = [
    (0, 0.82, 25, 53, 0.935),
    (1, 0.86, 23, 52, 0.938),
    (2, 1.09, 41, 59, 0.902),
    (3, 1.10, 47, 64, 0.886),
    (4, 1.39, 55, 71, 0.845),
    (5, 1.47, 47, 70, 0.837),
    (6, 1.43, 50, 72, 0.828),
    (7, 1.55, 50, 73, 0.815),
    (8, 1.51, 58, 73, 0.819),
    (9, 1.44, 53, 71, 0.836),
    (10, 1.31, 50, 68, 0.857),
    (11, 1.64, 55, 75, 0.809),
    (12, 1.42, 58, 72, 0.838),
    (13, 1.41, 56, 72, 0.835),
    (14, 1.38, 55, 72, 0.841),
    (15, 1.54, 59, 74, 0.818),
]


@pytest.mark.parametrize(("layer", "sample_cv", "cold", "coverage", "entropy"), TABLE_7)
def test_table_7_spider_layer_by_layer(olmoe, layer, sample_cv, cold, coverage, entropy):
    measured = routing_statistics(olmoe["spider"]).layers[f"layers.{layer}"]
    assert round(measured.cv * math.sqrt(64 / 63), 2) == sample_cv
    assert round(100 * measured.cold_fraction) == cold
    assert round(100 * measured.coverage) == coverage
    assert round(measured.normalized_entropy, 3) == entropy


def test_coverage_is_that_of_the_uniform_selection(olmoe):
    for profile in olmoe.values():
        for top_k_frac in (0.1, 0.25, 0.5, 1.0):
            measured = routing_statistics(profile, top_k_frac=top_k_frac)
            selected = select_experts(profile, top_k_frac=top_k_frac).coverage(profile)
            assert {name: layer.coverage for name, layer in measured.layers.items()} == selected


# --- definitions ----------------------------------------------------------------------------------------------------


def test_definitions_on_a_small_layer():
    """Mean 4, deviations -4, -3, -1, 8; half the uniform share is 2, so two experts are cold."""
    measured = routing_statistics(RoutingProfile.from_arrays([[0, 1, 3, 12]])).layers["layers.0"]
    assert measured.cv == pytest.approx(math.sqrt((16 + 9 + 1 + 64) / 4) / 4)
    assert measured.cold_fraction == 0.5
    assert measured.coverage == 0.75
    shares = [1 / 16, 3 / 16, 12 / 16]
    assert measured.normalized_entropy == pytest.approx(-sum(p * math.log(p, 4) for p in shares))


def test_half_the_uniform_share_is_not_cold():
    """12 tokens on 4 experts: the uniform share is 3, half of it 1.5; then 16 on 4, 4 and 2."""
    for counts, cold in [([1, 2, 4, 5], 0.25), ([2, 2, 6, 6], 0.0), ([1, 2, 6, 7], 0.25)]:
        measured = routing_statistics(RoutingProfile.from_arrays([counts])).layers["layers.0"]
        assert measured.cold_fraction == cold, counts


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 7, 60, 64])
def test_even_and_one_sided_routing_are_the_two_ends(num_experts):
    even = routing_statistics(RoutingProfile.from_arrays([[10**9 + 7] * num_experts])).layers["layers.0"]
    assert (even.cv, even.cold_fraction) == (0.0, 0.0)
    assert even.normalized_entropy == pytest.approx(1.0, abs=1e-12) and even.normalized_entropy <= 1.0
    if num_experts > 1:
        one = routing_statistics(RoutingProfile.from_arrays([[9] + [0] * (num_experts - 1)])).layers["layers.0"]
        assert one.cv == pytest.approx(math.sqrt(num_experts - 1))
        assert one.cold_fraction == (num_experts - 1) / num_experts
        assert (one.coverage, one.normalized_entropy) == (1.0, 0.0)


def test_global_cv_sums_the_layers_by_expert_index():
    """Each layer is as skewed as can be, all of them together are even."""
    measured = routing_statistics(RoutingProfile.from_arrays([[8, 0], [0, 8]]))
    assert measured.global_cv == 0.0
    assert measured.mean_layer_cv == 1.0
    assert routing_statistics(RoutingProfile.from_arrays([[8, 0], [4, 4]])).global_cv == pytest.approx(0.5)


def test_global_cv_of_layers_of_different_size_is_nan():
    measured = routing_statistics(RoutingProfile.from_arrays([[8, 0], [1, 2, 3]]))
    assert math.isnan(measured.global_cv)
    assert list(measured.layers) == ["layers.0", "layers.1"]


def test_means_are_over_the_layers():
    measured = routing_statistics(RoutingProfile.from_arrays([[8, 0, 0, 0], [1, 1, 1, 1]]))
    assert measured.mean_layer_cv == pytest.approx(math.sqrt(3) / 2)
    assert measured.mean_cold_fraction == 0.375
    assert measured.mean_coverage == 0.625
    assert measured.mean_normalized_entropy == 0.5


def test_an_unreached_layer_is_nan_and_left_out_of_the_means():
    measured = routing_statistics(RoutingProfile.from_arrays([[0, 0], [3, 1]]))
    unreached = measured.layers["layers.0"]
    for name in ("cv", "cold_fraction", "coverage", "normalized_entropy"):
        assert math.isnan(getattr(unreached, name))
    assert measured.mean_layer_cv == measured.layers["layers.1"].cv == 0.5
    assert measured.mean_coverage == 0.75
    assert measured.global_cv == 0.5


def test_a_profile_without_tokens_is_all_nan():
    measured = routing_statistics(RoutingProfile.from_arrays([[0, 0]]))
    for value in (measured.global_cv, measured.mean_layer_cv, measured.mean_cold_fraction, measured.mean_coverage):
        assert math.isnan(value)


def test_large_counts_do_not_overflow():
    measured = routing_statistics(RoutingProfile.from_arrays([[2**62, 2**62, 0, 0]] * 8))
    assert measured.global_cv == measured.mean_layer_cv == 1.0
    assert measured.mean_coverage == 0.5


@pytest.mark.parametrize("top_k_frac", [0, 1.1, float("nan"), True, "0.25", None])
def test_the_share_must_be_one(top_k_frac):
    with pytest.raises(SieveError, match=f"top_k_frac must be a number above 0 and at most 1, got {top_k_frac!r}"):
        routing_statistics(RoutingProfile.from_arrays([[1, 2]]), top_k_frac=top_k_frac)


def test_a_profile_must_be_one():
    with pytest.raises(SieveError, match="must be a RoutingProfile, got {'layers.0'"):
        routing_statistics({"layers.0": [1, 2]})
