"""Tables of what routers did, for terminals, logs and pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..routing.profile import RoutingProfile
from ..routing.selection import ExpertSelection
from ..routing.statistics import routing_statistics
from ..table import UNKNOWN, Table

_HEADER = ("layer", "adapted", "coverage", "cold", "CV")


def coverage_table(profile: RoutingProfile, selection: Mapping[str, Iterable[int]], *, score: str = "count") -> str:
    """`layer_table` as text: one line a layer, then one over all; no line break at the end."""
    return layer_table(profile, selection, score=score).to_text()


def layer_table(profile: RoutingProfile, selection: Mapping[str, Iterable[int]], *, score: str = "count") -> Table:
    """What a selection adapts and how much of the routing that is, layer by layer (columns of MoE-Sieve Table 7).

    Args:
        profile: what the router did.
        selection: layer name -> ids of the experts to adapt; an `ExpertSelection` or the `selected_experts` of a
            configuration. A layer of the profile that it leaves out adapts none.
        score: what the coverage is a share of: `count` (tokens routed), `mass` (summed gate weight) or a registered
            score.

    Returns:
        One row a layer in the profile's order, and a summary over all layers. Columns: experts adapted of all; their
        share of the layer's score; cold experts, which get fewer than half the uniform share of tokens; coefficient of
        variation of the counts. The summary has the sums of the experts and the means of the shares and variations,
        over the layers that tokens reached. A layer without tokens has dashes.

    Raises:
        SieveError: if the selection names a layer or an expert that the profile lacks, or the profile lacks the score.
    """
    chosen = ExpertSelection(selection)
    coverage = dict.fromkeys(profile.counts, 0.0) | chosen.coverage(profile, score=score)
    statistics = routing_statistics(profile)
    rows: list[Sequence[str]] = []
    reached, cold_experts = [], 0
    for layer, counts in profile.counts.items():
        adapted = f"{len(chosen.get(layer, ()))} of {len(counts)}"
        measured = statistics.layers[layer]
        if math.isnan(measured.cv):  # no token came here
            rows.append((layer, adapted, UNKNOWN, UNKNOWN, UNKNOWN))
            continue
        cold = round(measured.cold_fraction * len(counts))
        rows.append((layer, adapted, f"{coverage[layer]:.1%}", f"{cold} of {len(counts)}", f"{measured.cv:.2f}"))
        reached.append(layer)
        cold_experts += cold
    total = sum(map(len, profile.counts.values()))
    summary = ["all layers", f"{sum(map(len, chosen.values()))} of {total}", UNKNOWN, UNKNOWN, UNKNOWN]
    if reached:
        mean_coverage = math.fsum(coverage[layer] for layer in reached) / len(reached)
        cold_of = sum(len(profile.counts[layer]) for layer in reached)
        summary[2:] = [f"{mean_coverage:.1%}", f"{cold_experts} of {cold_of}", f"{statistics.mean_layer_cv:.2f}"]
    return Table(_HEADER, rows, summary)


def profiles_table(
    profiles: Mapping[str, RoutingProfile], selections: Mapping[str, ExpertSelection], *, score: str = "count"
) -> Table:
    """One row a profile: how skewed its routing is, and what a selection captures (columns of MoE-Sieve Table 2).

    Args:
        profiles: by the name to show.
        selections: the experts selected for each.
        score: what the coverage is a share of.

    Returns:
        Columns: tokens profiled; mean over the layers of the coefficient of variation, and the one over the sum of the
        layers; mean share of cold experts; experts selected of all; mean coverage by them, over the layers that tokens
        reached.
    """
    rows = []
    for name, profile in profiles.items():
        statistics, selection = routing_statistics(profile), selections[name]
        total = sum(map(len, profile.counts.values()))
        rows.append(
            (
                name,
                UNKNOWN if profile.num_tokens is None else f"{profile.num_tokens:,}",
                _or_unknown(statistics.mean_layer_cv, ".2f"),
                _or_unknown(statistics.global_cv, ".2f"),
                _or_unknown(statistics.mean_cold_fraction, ".1%"),
                f"{sum(map(len, selection.values())):,} of {total:,}",
                _or_unknown(mean_coverage(profile, selection, score), ".1%"),
            )
        )
    header = ("profile", "tokens", "layer CV", "global CV", "cold", "selected", "coverage")
    return Table(header, rows)


def mean_coverage(profile: RoutingProfile, selection: ExpertSelection, score: str = "count") -> float:
    """Mean over the layers that tokens reached of the score's share that the selected experts get; NaN without any."""
    shares = selection.coverage(profile, score=score)
    reached = [share for layer, share in shares.items() if bool(profile.counts[layer].any())]
    return math.fsum(reached) / len(reached) if reached else math.nan


def _or_unknown(value: float, form: str) -> str:
    return UNKNOWN if math.isnan(value) else format(value, form)
