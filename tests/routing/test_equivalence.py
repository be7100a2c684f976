"""Paired statistics: the published accuracies, scipy's tests written out, and values that cannot be tested."""

from __future__ import annotations

import ast
import json
import math
import random
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import peft_sieve
from peft_sieve import SieveError, holm_correction, paired_equivalence

ACCURACIES = Path(__file__).parents[1] / "data" / "olmoe_gsm8k_seed_accuracies.json"


@pytest.fixture(scope="module")
def olmoe() -> dict[str, dict[str, float]]:
    """Condition -> seed -> accuracy of OLMoE on GSM8K."""
    return {name.split("/")[-1]: values for name, values in json.loads(ACCURACIES.read_text()).items()}


def drawn(
    seed: int, num_pairs: int, spread: float = 1.0, noise: float = 0.01
) -> tuple[dict[int, float], dict[int, float]]:
    """Correlated accuracies: a common part and `noise` of their own; `spread` widens the second."""
    generator = random.Random(seed)
    common = [generator.gauss(0, 0.01) for _ in range(num_pairs)]
    first = {n: 0.5 + value + generator.gauss(0, noise) for n, value in enumerate(common)}
    second = {n: 0.5 + spread * (value + generator.gauss(0, noise)) for n, value in enumerate(common)}
    return first, second


# --- the paper's accuracies -----------------------------------------------------------------------------------------


def test_hot_16_against_full_lora_on_gsm8k(olmoe):
    result = paired_equivalence(olmoe["full_lora"], olmoe["hotk16"])
    assert result.num_pairs == 8
    assert round(100 * result.mean_difference, 2) == -0.08
    assert round(result.p_value, 3) == 0.900
    assert (result.margin, round(result.tost_p_value, 3), result.equivalent) == (0.02, 0.006, True)
    assert [round(100 * end, 2) for end in result.confidence_interval] == [-1.45, 1.30]
    assert round(result.std_ratio, 2) == 0.58
    narrow = paired_equivalence(olmoe["full_lora"], olmoe["hotk16"], margin=0.01)
    assert (round(narrow.tost_p_value, 3), narrow.equivalent) == (0.078, False)


def test_table_8_comes_out_only_when_each_condition_is_sorted_before_pairing(olmoe):
    """MoE-Sieve's Table 8 prints p = 0.753 and TOST p = 0.003 at 1 pp for the same accuracies."""
    full, hot = (dict(enumerate(sorted(olmoe[name].values()))) for name in ("full_lora", "hotk16"))
    by_rank = paired_equivalence(full, hot, margin=0.01)
    assert (round(by_rank.p_value, 3), round(by_rank.tost_p_value, 3)) == (0.753, 0.003)
    by_seed = paired_equivalence(olmoe["full_lora"], olmoe["hotk16"], margin=0.01)
    assert by_seed.mean_difference == pytest.approx(by_rank.mean_difference)
    # The files' own order is another way to pair without seeds; it is the seeds' order in each, so it changes nothing.
    assert list(olmoe["full_lora"]) == list(olmoe["hotk16"])


def test_all_conditions_corrected_for_their_number(olmoe):
    """Of 15 conditions, random experts differ from full LoRA; hot-4 does so only while its number is not counted."""
    results = {
        name: paired_equivalence(olmoe["full_lora"], values) for name, values in olmoe.items() if name != "full_lora"
    }
    assert len(results) == 15
    different = {name for name, result in results.items() if result.p_value < 0.05}
    assert different == {"hotk4", "randk8", "randk16"}
    corrected = holm_correction({name: result.p_value for name, result in results.items()})
    assert {name for name, p_value in corrected.items() if p_value < 0.05} == {"randk8", "randk16"}
    # No condition's variance over 8 seeds differs from full LoRA's once all are counted.
    spread = holm_correction({name: result.variance_p_value for name, result in results.items()})
    assert min(spread.values()) > 0.05


# --- against scipy, written out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [2, 3, 8, 30])
def test_agrees_with_the_textbook(num_pairs):
    first, second = drawn(num_pairs, num_pairs, spread=1.7)
    result = paired_equivalence(first, dict(reversed(second.items())), margin=0.004)
    a, b = np.array(list(first.values())), np.array(list(second.values()))
    difference, error = (b - a).mean(), (b - a).std(ddof=1) / math.sqrt(num_pairs)
    degrees = num_pairs - 1
    assert result.mean_difference == pytest.approx(difference)
    assert result.p_value == pytest.approx(stats.ttest_rel(b, a).pvalue)
    reach = stats.t.ppf(0.975, degrees) * error
    assert result.confidence_interval == pytest.approx((difference - reach, difference + reach))
    one_sided = stats.t.sf((difference + 0.004) / error, degrees), stats.t.cdf((difference - 0.004) / error, degrees)
    assert result.tost_p_value == pytest.approx(max(one_sided))
    assert result.std_ratio == pytest.approx(b.std(ddof=1) / a.std(ddof=1))
    assert result.variance_ratio == pytest.approx(b.var(ddof=1) / a.var(ddof=1))
    if num_pairs == 2:
        assert math.isnan(result.variance_p_value)
    else:
        assert result.variance_p_value == pytest.approx(stats.pearsonr(a + b, b - a).pvalue)


def test_equivalent_exactly_if_the_90_percent_interval_lies_within_the_margins():
    first, second = drawn(3, 8)
    values = [second[seed] - first[seed] for seed in first]
    reach = stats.t.ppf(0.95, 7) * statistics.stdev(values) / math.sqrt(8)
    edge = abs(statistics.fmean(values)) + reach
    assert not paired_equivalence(first, second, margin=edge * 0.9999).equivalent
    assert paired_equivalence(first, second, margin=edge * 1.0001).equivalent


def test_ends_of_the_variance_interval_are_where_the_test_just_rejects():
    first, second = drawn(5, 8, spread=2.0)
    result = paired_equivalence(first, second)
    low, high = result.variance_ratio_interval
    assert low < result.variance_ratio < high
    for end in (low, high):
        rescaled = {seed: value / math.sqrt(end) for seed, value in second.items()}
        assert paired_equivalence(first, rescaled, bounds=None).variance_p_value == pytest.approx(0.05)


def test_the_variance_interval_holds_the_truth_in_95_of_100():
    """True ratio 4, correlation 0.94; an interval that takes the pairs for independent would always hold it."""
    results = [paired_equivalence(*drawn(seed, 8, spread=2.0, noise=0.0025)) for seed in range(400)]
    share = statistics.fmean(
        result.variance_ratio_interval[0] < 4 < result.variance_ratio_interval[1] for result in results
    )
    assert 0.92 < share < 0.98


def test_swapping_the_conditions_mirrors_the_result():
    first, second = drawn(7, 6, spread=1.5)
    one, other = paired_equivalence(first, second), paired_equivalence(second, first)
    assert one.mean_difference == pytest.approx(-other.mean_difference)
    assert one.confidence_interval == pytest.approx([-end for end in reversed(other.confidence_interval)])
    assert (one.p_value, one.tost_p_value) == pytest.approx((other.p_value, other.tost_p_value))
    assert one.std_ratio == pytest.approx(1 / other.std_ratio)
    assert one.variance_ratio_interval == pytest.approx([1 / end for end in reversed(other.variance_ratio_interval)])


def test_percents_and_losses():
    first, second = drawn(9, 5)
    shares = paired_equivalence(first, second, margin=0.01)
    percents = paired_equivalence(
        *({seed: 100 * value for seed, value in values.items()} for values in (first, second)),
        margin=1,
        bounds=(0, 100),
    )
    assert percents.mean_difference == pytest.approx(100 * shares.mean_difference)
    assert (percents.p_value, percents.tost_p_value) == pytest.approx((shares.p_value, shares.tost_p_value))
    losses = paired_equivalence({0: 2.5, 1: 2.25, 2: 2.0}, {0: 2.0, 1: 2.5, 2: 1.0}, margin=5, bounds=None)
    assert losses.mean_difference == pytest.approx(-5 / 12)


def test_numbers_of_numpy_will_do():
    first, second = drawn(1, 4)
    arrays = [{seed: np.float64(value) for seed, value in values.items()} for values in (first, second)]
    assert paired_equivalence(*arrays) == paired_equivalence(first, second)


# --- where there is no variation ------------------------------------------------------------------------------------


def test_the_same_accuracies_twice():
    values = {0: 0.25, 1: 0.5, 2: 0.75}
    with pytest.warns(UserWarning, match="All seeds give the same difference, 0, so the p-values are limits") as caught:
        result = paired_equivalence(values, dict(values))
    assert caught[0].filename == __file__
    assert (result.mean_difference, result.confidence_interval) == (0.0, (0.0, 0.0))
    assert (result.p_value, result.tost_p_value, result.equivalent) == (1.0, 0.0, True)
    assert (result.std_ratio, result.variance_p_value) == (1.0, 1.0)


@pytest.mark.parametrize(("margin", "tost"), [(0.02, 0.0), (0.01, 1.0), (0.005, 1.0)])
def test_a_constant_difference_is_one_although_its_floats_differ(margin, tost):
    """0.61 - 0.60 and 0.08 - 0.07 are not the same float. On the margin is not within it."""
    first, second = {0: 0.60, 1: 0.29, 2: 0.07}, {0: 0.61, 1: 0.30, 2: 0.08}
    assert len({second[seed] - first[seed] for seed in first}) > 1
    with pytest.warns(UserWarning, match="the same difference, 0.01"):
        result = paired_equivalence(first, second, margin=margin)
    assert (result.p_value, result.tost_p_value, result.equivalent) == (0.0, tost, tost == 0.0)
    assert result.std_ratio == pytest.approx(1.0)
    assert result.variance_p_value == pytest.approx(1.0, abs=1e-6)
    assert result.variance_ratio_interval == pytest.approx((1.0, 1.0), abs=1e-4)


def test_one_condition_does_not_vary():
    varying, constant = {0: 0.1, 1: 0.2, 2: 0.4}, {0: 0.3, 1: 0.1 + 0.2, 2: 0.3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onto, off = paired_equivalence(varying, constant), paired_equivalence(constant, varying)
    assert (onto.std_ratio, off.std_ratio) == (0.0, math.inf)
    for result in (onto, off):
        assert math.isnan(result.variance_p_value) and all(map(math.isnan, result.variance_ratio_interval))
        assert math.isfinite(result.p_value)
    with pytest.warns(UserWarning, match="the same difference"):
        assert math.isnan(paired_equivalence(constant, {0: 0.5, 1: 0.5, 2: 0.5}).std_ratio)


# --- what is refused ------------------------------------------------------------------------------------------------

GOOD = {0: 0.25, 1: 0.5}


@pytest.mark.parametrize(
    ("reference", "candidate", "options", "message"),
    [
        ([0.1, 0.2], GOOD, {}, "reference must be a mapping from seed to accuracy, got"),
        (
            GOOD,
            {0: 0.25, 2: 0.5},
            {},
            "Only one condition has the seeds 1, 2. .* leave it out of both",
        ),
        (GOOD, {"0": 0.25, "1": 0.5}, {}, "has the seeds '0', '1', 0, 1. Make both whole numbers: JSON"),
        ({0: 0.5}, {0: 0.5}, {}, "at least 2 pairs of accuracies, got 1"),
        ({}, {}, {}, "at least 2 pairs of accuracies, got 0"),
        (GOOD, {0: 0.25, 1: math.nan}, {}, "candidate's accuracy for seed 1 must be a finite.*got nan"),
        ({0: math.inf, 1: 0}, GOOD, {"bounds": None}, "reference's accuracy for seed 0.*got inf"),
        (GOOD, {0: 0.25, 1: "0.5"}, {}, "candidate's accuracy for seed 1.*got '0.5'"),
        (GOOD, {0: 0.25, 1: True}, {}, "candidate's accuracy.*got True"),
        (GOOD, {0: 25.5, 1: 50}, {}, r"from 0 to 1, got 25.5. Pass bounds=\(0, 100\)"),
        (GOOD, GOOD, {"margin": 0}, "margin must be a number above 0 and below 1, the whole range.*got 0"),
        (GOOD, GOOD, {"margin": -0.01}, "margin must be .*got -0.01"),
        (GOOD, GOOD, {"margin": 2}, "margin must be .*got 2. .* such as 0.02 for two percentage points of shares"),
        (GOOD, GOOD, {"margin": math.nan, "bounds": None}, "margin must be a number above 0, got nan"),
        (GOOD, GOOD, {"margin": math.inf, "bounds": None}, "margin must be .*got inf"),
        (GOOD, GOOD, {"margin": "0.02"}, "margin must be .*got '0.02'"),
        (GOOD, GOOD, {"bounds": (1, 0)}, r"bounds must be the least and the greatest value.*got \(1, 0\)"),
        (GOOD, GOOD, {"bounds": 100}, "bounds must be .*got 100"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(reference: Any, candidate: Any, options: dict[str, Any], message: str):
    with pytest.raises(SieveError, match=message):
        paired_equivalence(reference, candidate, **options)


# --- Holm -----------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    """0.01 * 4, then 0.02 * 3 = 0.06, then 0.03 * 2 = 0.06, then max(0.06, 0.04); order as given."""
    adjusted = holm_correction({"d": 0.04, "b": 0.02, "a": 0.01, "c": 0.03})
    assert list(adjusted) == ["d", "b", "a", "c"]
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert holm_correction({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm_correction({"a": 0.04}) == {"a": 0.04}
    assert holm_correction({}) == {}


def test_holm_rejects_step_by_step():
    """The definition: go up the sorted p-values while p <= alpha / (tests left)."""
    generator = random.Random(0)
    for _ in range(200):
        p_values = {str(n): generator.random() ** 4 for n in range(generator.randint(1, 8))}
        rejected = set()
        for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
            if p_values[name] > 0.05 / (len(p_values) - rank):
                break
            rejected.add(name)
        assert {name for name, value in holm_correction(p_values).items() if value <= 0.05} == rejected


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.1, "0.5", None, True])
def test_holm_wants_p_values(value):
    with pytest.raises(SieveError, match=f"p-value of 'a' must be a number from 0 to 1, got {value!r}"):
        holm_correction({"a": value, "b": 0.5})
    with pytest.raises(SieveError, match="p_values must be a mapping"):
        holm_correction([0.5])  # type: ignore[arg-type]


def test_scipy_is_imported_only_where_it_is_used():
    """Importing it takes longer than importing all of this package's own modules."""
    for file in Path(peft_sieve.__file__).parent.rglob("*.py"):
        at_import = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("scipy" in ast.unparse(node) for node in at_import), file
