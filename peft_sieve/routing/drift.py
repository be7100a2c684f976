"""How far routing has moved away from the mask that was made for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .profile import RoutingProfile
from .selection import ExpertSelection, hottest_experts


@dataclass(frozen=True)
class RoutingDrift:
    """Fresh counts against a mask, as means over the layers that they reached.

    Attributes:
        jaccard: agreement of the mask with the one that the fresh counts would give with as many experts in each layer,
            in [0, 1]; 1.0 if both are the same. NaN if no layer was reached.
        coverage: share of the score that the mask's experts got, in [0, 1]. NaN if no layer was reached.
    """

    jaccard: float
    coverage: float


def routing_drift(profile: RoutingProfile, mask: ExpertSelection, *, score: str = "count") -> RoutingDrift:
    """Compare a mask with what the router did since.

    Args:
        profile: fresh counts; it must have the layers of the mask.
        mask: the adapted experts.
        score: by which experts are the hottest, and of which the coverage is a share.

    Raises:
        SieveError: the profile lacks a layer of the mask, or the score.
    """
    coverage = mask.coverage(profile, score=score)
    fresh = hottest_experts(profile, {layer: len(experts) for layer, experts in mask.items()}, score=score)
    overlap = mask.layer_jaccard(fresh)
    reached = [layer for layer, experts in mask.items() if experts and fresh[layer]]
    if not reached:
        return RoutingDrift(math.nan, math.nan)
    return RoutingDrift(
        jaccard=math.fsum(overlap[layer] for layer in reached) / len(reached),
        coverage=math.fsum(coverage[layer] for layer in reached) / len(reached),
    )
