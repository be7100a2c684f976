"""Is a condition as good as another? Statistics on accuracies that are paired by seed (MoE-Sieve §5, Table 8)."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import is_number, must_be, number
from ..errors import SieveError
from ..table import UNKNOWN, Table

ALPHA = 0.05  # level of the tests; intervals hold 1 - ALPHA
# Differences of decimal fractions that are equal on paper differ by a few units in the last place.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedEquivalence:
    """How a candidate compares with a reference, seed by seed. Differences are candidate minus reference.

    Attributes:
        num_pairs: seeds, >= 2.
        margin: the difference that still counts as none, in the unit of the accuracies.
        mean_difference: mean over the seeds, in the unit of the accuracies.
        confidence_interval: 95% interval of the mean difference (Student's t).
        p_value: two-sided paired t-test of "the means are equal".
        tost_p_value: the larger p-value of two one-sided paired t-tests, of "the difference is at most -margin" and "at
            least margin". Below 0.05 exactly if the 90% interval of the mean difference lies inside the margins.
        std_ratio: sample standard deviation over the seeds, candidate's over reference's: below 1 where the candidate
            depends less on the seed. NaN if neither varies, infinite if only the candidate does.
        variance_ratio_interval: 95% interval of the ratio of the variances (`variance_ratio`) from paired values, by
            inversion of Pitman and Morgan's test. NaN if there are fewer than 3 pairs, or if either does not vary.
        variance_p_value: two-sided test of Pitman and Morgan of "the variances are equal"; NaN likewise.
    """

    num_pairs: int
    margin: float
    mean_difference: float
    confidence_interval: tuple[float, float]
    p_value: float
    tost_p_value: float
    std_ratio: float
    variance_ratio_interval: tuple[float, float]
    variance_p_value: float

    @property
    def equivalent(self) -> bool:
        """Whether the difference is shown to lie within the margins: `tost_p_value` below 0.05."""
        return self.tost_p_value < ALPHA

    @property
    def variance_ratio(self) -> float:
        """Variance over the seeds, candidate's over reference's."""
        return self.std_ratio**2

    def to_table(self) -> Table:
        """One row per question: what was found, its 95% interval, and the p-value of the test."""
        mean, std = f"{self.mean_difference:+.4g}", _rounded(self.std_ratio)
        variance = _rounded(self.variance_ratio)
        within = f"within {self.margin:g}: {'shown' if self.equivalent else 'not shown'}"
        rows = [
            ("mean difference", mean, _interval(self.confidence_interval), _rounded(self.p_value)),
            (within, mean, UNKNOWN, _rounded(self.tost_p_value)),
            ("ratio of variances", variance, _interval(self.variance_ratio_interval), _rounded(self.variance_p_value)),
            ("ratio of standard deviations", std, UNKNOWN, UNKNOWN),
        ]
        return Table((f"candidate against reference, {self.num_pairs} seeds", "value", "95% interval", "p"), rows)

    def _repr_html_(self) -> str:
        return self.to_table().to_html()


def paired_equivalence(
    reference: Mapping[Any, float],
    candidate: Mapping[Any, float],
    *,
    margin: float = 0.02,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> PairedEquivalence:
    """Compare two conditions that were run with the same seeds.

    If all differences are the same (to rounding), Student's t has no value. Then the results are the limits for ever
    smaller variation, and a `UserWarning` says so: the interval is the difference itself, `p_value` is 1.0 for a
    difference of 0 and 0.0 for any other, `tost_p_value` is 0.0 inside the margins and 1.0 on or outside them.

    Args:
        reference: seed -> accuracy of the condition to compare with, such as LoRA on all experts.
        candidate: the same for the other condition, with the same seeds in any order.
        margin: the largest difference that counts as none, above 0, in the unit of the accuracies: 0.02 is two
            percentage points.
        bounds: the least and the greatest value that the metric can take: `(0, 100)` for percents (then with a `margin`
            in percentage points), None for a metric without bounds, such as a loss.

    Returns:
        The comparison.

    Raises:
        SieveError: if the seeds differ or are fewer than 2, a value is not a finite number within `bounds`, or `margin`
            is not above 0 and smaller than the whole range of the metric.
    """
    low, high = _checked_bounds(bounds)
    margin = _checked_margin(margin, high - low)
    first = _checked_values(reference, "reference", low, high)
    second = _checked_values(candidate, "candidate", low, high)
    _check_same_seeds(first, second)
    seeds = list(first)
    x, y = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    differences = [b - a for a, b in zip(x, y, strict=True)]
    mean = math.fsum(differences) / len(seeds)
    largest = max(map(abs, [*x, *y]))
    interval, p_value, tost_p_value = (
        _limits(mean, margin, largest) if _constant(differences, largest) else _t_tests(differences, margin)
    )
    std_ratio, variance_interval, variance_p_value = _variances(x, y, largest)
    return PairedEquivalence(
        num_pairs=len(seeds),
        margin=margin,
        mean_difference=mean,
        confidence_interval=interval,
        p_value=p_value,
        tost_p_value=tost_p_value,
        std_ratio=std_ratio,
        variance_ratio_interval=variance_interval,
        variance_p_value=variance_p_value,
    )


def holm_correction(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p-values of several conditions so that all of them together err as rarely as one (Holm 1979).

    Args:
        p_values: condition -> p-value, such as the `p_value` or the `tost_p_value` of `paired_equivalence`.

    Returns:
        Condition -> adjusted p-value, in the order given. Those below 0.05 hold at 5% over the whole family.

    Raises:
        SieveError: if a p-value is not a number in [0, 1].
    """
    if not isinstance(p_values, Mapping):
        raise must_be("p_values", "a mapping from condition to p-value", p_values)
    for condition, value in p_values.items():
        advice = "Leave out conditions that could not be tested."
        number(f"The p-value of {condition!r}", value, lambda given: 0 <= given <= 1, "a number from 0 to 1", advice)
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, condition in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[condition])))
        adjusted[condition] = largest
    return {condition: adjusted[condition] for condition in p_values}


# --- tests ----------------------------------------------------------------------------------------------------------
# scipy is imported where it is used: `import peft_sieve` need not wait for it.


def _t_tests(differences: list[float], margin: float) -> tuple[tuple[float, float], float, float]:
    """Interval, paired t-test and two one-sided tests."""
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(1 - ALPHA)
    one_sided = (
        ttest_1samp(differences, -margin, alternative="greater").pvalue,
        ttest_1samp(differences, margin, alternative="less").pvalue,
    )
    return (float(interval.low), float(interval.high)), float(test.pvalue), float(max(one_sided))


def _limits(mean: float, margin: float, largest: float) -> tuple[tuple[float, float], float, float]:
    """The same for differences without variation."""
    warnings.warn(
        f"All seeds give the same difference, {mean:.6g}, so the p-values are limits and prove little. Check that the "
        "conditions are two and that the metric is fine enough to vary.",
        UserWarning,
        stacklevel=3,
    )
    rounding = _ROUNDING * largest
    inside = abs(mean) < margin - rounding
    return (mean, mean), 1.0 if abs(mean) <= rounding else 0.0, 0.0 if inside else 1.0


def _variances(x: list[float], y: list[float], largest: float) -> tuple[float, tuple[float, float], float]:
    """Ratio of the standard deviations, interval of the ratio of the variances, and test of their equality.

    Values paired by seed are correlated, so the ratio does not follow F. Pitman and Morgan: the variances are equal
    exactly if sums and differences of the pairs are uncorrelated, and that is a t-test with n - 2 degrees of freedom.
    """
    varies, y_varies = not _constant(x, largest), not _constant(y, largest)
    unknown = (math.nan, math.nan)
    if not varies:
        return math.inf if y_varies else math.nan, unknown, math.nan
    ratio = statistics.stdev(y) / statistics.stdev(x) if y_varies else 0.0
    degrees = len(x) - 2
    if not y_varies or degrees < 1:
        return ratio, unknown, math.nan

    from scipy.stats import t as student

    correlation = statistics.correlation(x, y)
    unexplained = max(_ROUNDING, 1 - correlation**2)  # not 0, so that ratios of 1 to rounding stay equal
    # t of the correlation between y + x and y - x, written with the ratio so that it can be solved for the ratio.
    scale = math.sqrt(unexplained / degrees)
    p_value = 2 * float(student.sf(abs(ratio - 1 / ratio) / (2 * scale), degrees))
    # Not rejected are the true ratios for which s, the measured over the true one, has |s - 1/s| / (2 * scale) <= t.
    reach = float(student.ppf(1 - ALPHA / 2, degrees)) * scale
    factor = math.sqrt(1 + reach**2) + reach  # s is between 1 / factor and factor
    return ratio, (ratio**2 / factor**2, ratio**2 * factor**2), p_value


def _rounded(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.3g}"


def _interval(ends: tuple[float, float]) -> str:
    return UNKNOWN if any(map(math.isnan, ends)) else f"{ends[0]:.3g} to {ends[1]:.3g}"


def _constant(values: list[float], largest: float) -> bool:
    return max(values) - min(values) <= _ROUNDING * largest


# --- input ----------------------------------------------------------------------------------------------------------


def _checked_bounds(bounds: Any) -> tuple[float, float]:
    if bounds is None:
        return -math.inf, math.inf
    fine = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(is_number, bounds))
    if not fine or not bounds[0] < bounds[1]:
        advice = "Pass (0, 1) for shares, (0, 100) for percents."
        raise must_be("bounds", "the least and the greatest value of the metric, or None", bounds, advice)
    return float(bounds[0]), float(bounds[1])


def _checked_margin(margin: Any, width: float) -> float:
    below = "" if math.isinf(width) else f" and below {width:g}, the whole range of the metric"
    advice = "It is in the unit of the accuracies, such as 0.02 for two percentage points of shares."
    return float(number("margin", margin, lambda given: 0 < given < width, f"a number above 0{below}", advice))


def _checked_values(values: Any, which: str, low: float, high: float) -> dict[Any, float]:
    if not isinstance(values, Mapping):
        raise must_be(which, "a mapping from seed to accuracy", values)
    kind = f"a finite number from {low:g} to {high:g}"
    advice = "Pass bounds=(0, 100) for percents, None for a loss, and leave seeds out whose run failed."
    for seed, value in values.items():
        number(f"The {which}'s accuracy for seed {seed!r}", value, lambda given: low <= given <= high, kind, advice)
    return {seed: float(value) for seed, value in values.items()}


def _check_same_seeds(first: Mapping[Any, float], second: Mapping[Any, float]) -> None:
    only_one = sorted(map(repr, first.keys() ^ second.keys()))
    if only_one:
        same_text = {str(seed) for seed in first} == {str(seed) for seed in second}
        advice = (
            "Make both whole numbers: JSON turns the keys of a mapping into strings."
            if same_text
            else "Run what is missing or leave it out of both."
        )
        raise SieveError(f"Only one condition has the seeds {', '.join(only_one)}. {advice}")
    if len(first) < 2:
        raise SieveError(f"There must be at least 2 pairs of accuracies, got {len(first)}. Run more seeds.")
