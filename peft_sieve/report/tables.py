"""Plain-text tables for terminals and logs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from peft_sieve.routing.profile_data import RoutingProfile
from peft_sieve.routing.selection import ExpertSelection
from peft_sieve.routing.statistics import LayerStatistics, routing_statistics

_HEADER = ("layer", "adapted", "coverage", "cold", "CV")
_UNKNOWN = "-"


def coverage_table(
    profile: RoutingProfile, selection: Mapping[str, Iterable[int]], *, score: str = "count"
) -> str:
    """What a selection adapts and how much of the routing that is, layer by layer (MoE-Sieve Table 7).

    Args:
        profile: what the router did.
        selection: layer name -> ids of the experts to adapt; an `ExpertSelection` or the `selected_experts` of a
            configuration. A layer of the profile that it leaves out adapts none.
        score: what the coverage is a share of: `count` (tokens routed), `mass` (summed gate weight) or a registered
            score.

    Returns:
        Lines of equal meaning, without a final line break: one row a layer in the profile's order, then one over all
        layers. The columns are the experts adapted of all, the share of the score that they received, the experts
        that get fewer than half the uniform share of tokens, and the coefficient of variation of the counts. The last
        row adds up the experts and takes the mean of the rest over the layers that tokens reached. What a layer
        without tokens cannot have is a dash.

    Raises:
        SieveError: if the selection names a layer or an expert that the profile lacks, or the profile lacks the score.
    """
    chosen = ExpertSelection(selection)
    coverage = chosen.coverage(profile, score=score)
    statistics = routing_statistics(profile)
    rows: list[Sequence[str]] = [_HEADER]
    for layer, counts in profile.counts.items():
        measured = statistics.layers[layer]
        # A layer without tokens has no shares; one that nothing was selected in has covered none of them.
        share = coverage.get(layer, 0.0) if _reached(measured) else math.nan
        rows.append(
            (
                layer,
                _of(len(chosen.get(layer, ())), len(counts)),
                _percent(share),
                _cold(measured, len(counts)),
                _number(measured.cv),
            )
        )
    reached = {layer: measured for layer, measured in statistics.layers.items() if _reached(measured)}
    rows.append(
        (
            "all layers" if len(profile.counts) > 1 else "in all",
            _of(sum(map(len, chosen.values())), sum(map(len, profile.counts.values()))),
            _percent(_mean([coverage.get(layer, 0.0) for layer in reached])),
            _of(
                sum(round(measured.cold_fraction * len(profile.counts[layer])) for layer, measured in reached.items()),
                sum(len(profile.counts[layer]) for layer in reached),
            )
            if reached
            else _UNKNOWN,
            _number(statistics.mean_layer_cv),
        )
    )
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right, a rule below the header and above the last row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _reached(layer: LayerStatistics) -> bool:
    return not math.isnan(layer.cv)


def _cold(layer: LayerStatistics, num_experts: int) -> str:
    return _of(round(layer.cold_fraction * num_experts), num_experts) if _reached(layer) else _UNKNOWN


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}"


def _percent(share: float) -> str:
    return _UNKNOWN if math.isnan(share) else f"{share:.1%}"


def _number(value: float) -> str:
    return _UNKNOWN if math.isnan(value) else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
