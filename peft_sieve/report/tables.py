"""Plain-text tables for terminals and logs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from peft_sieve.routing.profile_data import RoutingProfile
from peft_sieve.routing.selection import ExpertSelection
from peft_sieve.routing.statistics import routing_statistics

_HEADER = ("layer", "adapted", "coverage", "cold", "CV")
_UNKNOWN = "-"


def coverage_table(profile: RoutingProfile, selection: Mapping[str, Iterable[int]], *, score: str = "count") -> str:
    """What a selection adapts and how much of the routing that is, layer by layer (columns of MoE-Sieve Table 7).

    Args:
        profile: what the router did.
        selection: layer name -> ids of the experts to adapt; an `ExpertSelection` or the `selected_experts` of a
            configuration. A layer of the profile that it leaves out adapts none.
        score: what the coverage is a share of: `count` (tokens routed), `mass` (summed gate weight) or a registered
            score.

    Returns:
        One line a layer in the profile's order, then one over all layers; no line break at the end. Columns: experts
        adapted of all; their share of the layer's score; cold experts, which get fewer than half the uniform share of
        tokens; coefficient of variation of the counts. The last line has the sums of the experts and the means of the
        shares and variations, over the layers that tokens reached. A layer without tokens has dashes.

    Raises:
        SieveError: if the selection names a layer or an expert that the profile lacks, or the profile lacks the score.
    """
    chosen = ExpertSelection(selection)
    coverage = dict.fromkeys(profile.counts, 0.0) | chosen.coverage(profile, score=score)
    statistics = routing_statistics(profile)
    rows: list[Sequence[str]] = [_HEADER]
    reached, cold_experts = [], 0
    for layer, counts in profile.counts.items():
        adapted = f"{len(chosen.get(layer, ()))} of {len(counts)}"
        measured = statistics.layers[layer]
        if math.isnan(measured.cv):  # no token came here
            rows.append((layer, adapted, _UNKNOWN, _UNKNOWN, _UNKNOWN))
            continue
        cold = round(measured.cold_fraction * len(counts))
        rows.append((layer, adapted, f"{coverage[layer]:.1%}", f"{cold} of {len(counts)}", f"{measured.cv:.2f}"))
        reached.append(layer)
        cold_experts += cold
    total = sum(map(len, profile.counts.values()))
    summary = ["all layers", f"{sum(map(len, chosen.values()))} of {total}", _UNKNOWN, _UNKNOWN, _UNKNOWN]
    if reached:
        mean_coverage = math.fsum(coverage[layer] for layer in reached) / len(reached)
        cold_of = sum(len(profile.counts[layer]) for layer in reached)
        summary[2:] = [f"{mean_coverage:.1%}", f"{cold_experts} of {cold_of}", f"{statistics.mean_layer_cv:.2f}"]
    return _aligned([*rows, summary])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right, a rule below the header and above the last row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
