"""How skewed a router is: the imbalance statistics of MoE-Sieve (arXiv 2603.24044, §3 and Appendix A)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import share
from ..table import UNKNOWN, Table
from .profile import RoutingProfile, check_profile
from .strategies import experts_per_layer


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's routing skew (MoE-Sieve Table 7). All are NaN for a layer that no token reached.

    Attributes:
        cv: coefficient of variation of the counts, population standard deviation over mean, >= 0; 0 when all experts
            get as many tokens.
        cold_fraction: share of the experts, in [0, 1], that get fewer than half the uniform share (total over number
            of experts).
        coverage: share of the layer's counts, in (0, 1], that its most used experts get.
        normalized_entropy: entropy of the counts to the base of the number of experts, in [0, 1]; 1 when all experts
            get as many tokens, and for a single expert.
    """

    cv: float
    cold_fraction: float
    coverage: float
    normalized_entropy: float


def _mean_over_layers(name: str) -> property:
    def mean(statistics: RoutingStatistics) -> float:
        values = (getattr(layer, name) for layer in statistics.layers.values())
        known = [value for value in values if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan

    return property(mean, doc=f"Mean of the layers' `{name}`, over those that tokens reached; NaN if there are none.")


@dataclass(frozen=True)
class RoutingStatistics:
    """A profile's routing skew, by layer and overall (MoE-Sieve Table 2, for one data set).

    Attributes:
        layers: layer name -> its statistics, in the profile's order.
        global_cv: coefficient of variation of the counts summed over the layers, expert index by expert index; small
            where the layers' hot experts differ. NaN if layers have different numbers of experts, for their indices
            then do not match, or if no token was routed.
        mean_layer_cv, mean_cold_fraction, mean_coverage, mean_normalized_entropy: means over the layers that tokens
            reached; NaN if there are none.
    """

    layers: dict[str, LayerStatistics]
    global_cv: float

    mean_layer_cv = _mean_over_layers("cv")
    mean_cold_fraction = _mean_over_layers("cold_fraction")
    mean_coverage = _mean_over_layers("coverage")
    mean_normalized_entropy = _mean_over_layers("normalized_entropy")

    def to_table(self) -> Table:
        """One row per layer, and a summary with the means over the layers that tokens reached; "-" for NaN."""
        rows = [
            _cells(name, (layer.cv, layer.cold_fraction, layer.coverage, layer.normalized_entropy))
            for name, layer in self.layers.items()
        ]
        means = (self.mean_layer_cv, self.mean_cold_fraction, self.mean_coverage, self.mean_normalized_entropy)
        header = ("layer", "CV", "cold experts", "coverage of the hottest", "entropy")
        return Table(header, rows, _cells("mean of the layers", means))

    def _repr_html_(self) -> str:
        return self.to_table().to_html()


def routing_statistics(profile: RoutingProfile, *, top_k_frac: float = 0.25) -> RoutingStatistics:
    """Measure how unevenly a router uses its experts (MoE-Sieve §3).

    Args:
        profile: what the router did; only its counts are used.
        top_k_frac: share of a layer's experts, in (0, 1], whose `coverage` is reported:
            `max(1, round(top_k_frac * num_experts))` experts.

    Returns:
        The statistics of each layer and overall.

    Raises:
        SieveError: if `top_k_frac` is not in (0, 1] or `profile` is not a `RoutingProfile`.
    """
    share("top_k_frac", top_k_frac)
    check_profile(profile)
    counts: dict[str, list[int]] = {name: layer.tolist() for name, layer in profile.counts.items()}
    global_cv = math.nan
    if len({len(layer) for layer in counts.values()}) == 1:
        global_cv = _cv([sum(expert) for expert in zip(*counts.values(), strict=True)])
    return RoutingStatistics(
        layers={name: _layer_statistics(layer, top_k_frac) for name, layer in counts.items()}, global_cv=global_cv
    )


def _cells(name: str, values: Sequence[float]) -> tuple[str, ...]:
    forms = (".2f", ".1%", ".1%", ".3f")
    return name, *(UNKNOWN if math.isnan(v) else format(v, form) for v, form in zip(values, forms, strict=True))


def _layer_statistics(counts: Sequence[int], top_k_frac: float) -> LayerStatistics:
    total, num_experts = sum(counts), len(counts)
    if total == 0:
        return LayerStatistics(math.nan, math.nan, math.nan, math.nan)
    hottest = sorted(counts, reverse=True)[: experts_per_layer(num_experts, top_k_frac)]
    return LayerStatistics(
        cv=_cv(counts),
        cold_fraction=sum(2 * count * num_experts < total for count in counts) / num_experts,
        coverage=sum(hottest) / total,
        normalized_entropy=_normalized_entropy(counts),
    )


def _cv(counts: Sequence[int]) -> float:
    mean = sum(counts) / len(counts)
    if mean == 0:
        return math.nan
    variance = math.fsum((count - mean) ** 2 for count in counts) / len(counts)
    return math.sqrt(variance) / mean


def _normalized_entropy(counts: Sequence[int]) -> float:
    if len(counts) == 1:
        return 1.0
    total = sum(counts)
    shares = [count / total for count in counts if count]
    entropy = -math.fsum(share * math.log(share) for share in shares) / math.log(len(counts))
    return min(max(entropy, 0.0), 1.0)  # rounding may step over either end
