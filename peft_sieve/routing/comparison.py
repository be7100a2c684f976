"""Numbers behind the figures: coverage against the number of experts, overlap of data sets, stability of subsamples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import share
from ..errors import SieveError
from .profile import RoutingProfile, check_profile
from .profile_fields import check_experts_match
from .scores import layer_scores
from .selection import select_experts
from .stability import drawable


def coverage_curves(profile: RoutingProfile, *, score: str = "count") -> dict[str, list[float]]:
    """The share of each layer's score that its k hottest experts get, for every k (MoE-Sieve §3).

    Args:
        profile: what the router did.
        score: `count` (tokens routed), `mass` (summed gate weight) or a registered score.

    Returns:
        Layer name -> `num_experts` rising shares in (0, 1], the first for k = 1. A layer that no token reached is left
        out.

    Raises:
        SieveError: if no score has that name, or the profile lacks what it needs.
    """
    curves = {}
    for layer, values in layer_scores(profile, score).items():
        sums = list(accumulate(sorted(values, reverse=True)))
        if sums[-1] > 0:
            curves[layer] = [min(value / sums[-1], 1.0) for value in sums]
    return curves


def jaccard_matrix(profiles: Mapping[str, RoutingProfile], **options: Any) -> Tensor:
    """How far the experts selected for several data sets agree (MoE-Sieve §3).

    Args:
        profiles: by name, of the same model.
        options: of `select_experts`, the same for all.

    Returns:
        Symmetric, float64, `(profiles, profiles)` in their order: mean over layers of experts in both selections over
        experts in either.

    Raises:
        SieveError: if the profiles are of different models, or an option is out of range.
    """
    check_same_layers(profiles)
    selections = [select_experts(profile, **options) for profile in profiles.values()]
    return torch.tensor([[one.jaccard(other) for other in selections] for one in selections], dtype=torch.float64)


def resampled_stability(
    profile: RoutingProfile, fractions: Sequence[float], *, repeats: int = 5, seed: int = 0, **options: Any
) -> list[float]:
    """How much of the selection a part of the profile's dispatches would have given, drawn at random one by one.

    The tokens of a text resemble each other, so real subsamples of as many tokens agree less: this is the best case.

    Args:
        profile: what the router did.
        fractions: sizes of the parts, in (0, 1].
        repeats: draws to take the mean over, >= 1.
        seed: of the draws.
        options: of `select_experts`; its `seed` stays at 0.

    Returns:
        For each fraction the mean Jaccard overlap, in [0, 1], with the selection from the whole profile; 1.0 for a
        fraction of 1.

    Raises:
        SieveError: if a fraction is out of range, no token reached any layer, or an option is out of range.
    """
    check_profile(profile)
    for fraction in fractions:
        share("fraction", fraction)
    # The mass of a part is not known, only its counts.
    whole = RoutingProfile(counts={name: counts for name, counts in profile.counts.items() if bool(counts.any())})
    reference = select_experts(whole, **options)
    generator = np.random.default_rng(seed)
    stability = []
    for fraction in fractions:
        overlaps = [
            select_experts(_part(whole, fraction, generator), **options).jaccard(reference) for _ in range(repeats)
        ]
        stability.append(math.fsum(overlaps) / repeats)
    return stability


def smaller_sample_stability(
    profiles: Mapping[str, RoutingProfile], **options: Any
) -> dict[str, list[tuple[str, int, float]]]:
    """How far the selections from smaller samples of a data set agree with the one from its largest (MoE-Sieve §3).

    Args:
        profiles: by name. Those with the same data set and model in their metadata belong together, if their tokens
            are known.
        options: of `select_experts`, the same for all.

    Returns:
        Data set -> (profile's name, tokens, mean Jaccard overlap with the largest), by rising tokens, without the
        largest itself; data sets with a single sample are left out.

    Raises:
        SieveError: if profiles of one data set and model have different layers, or an option is out of range.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, profile in profiles.items():
        data, model = profile.metadata.get("dataset"), profile.metadata.get("model", "")
        if isinstance(data, str) and profile.num_tokens is not None:
            groups.setdefault((data, str(model)), []).append(name)
    found = {}
    for (data, _), names in groups.items():
        *smaller, largest = sorted(names, key=lambda name: profiles[name].num_tokens or 0)
        if not smaller:
            continue
        check_same_layers({name: profiles[name] for name in names})
        reference = select_experts(profiles[largest], **options)
        found[data] = [
            (name, profiles[name].num_tokens or 0, select_experts(profiles[name], **options).jaccard(reference))
            for name in smaller
        ]
    return found


def check_same_layers(profiles: Mapping[str, RoutingProfile]) -> None:
    """Refuse to compare profiles of different models.

    Raises:
        SieveError: if layers or numbers of experts differ, or there is no profile.
    """
    if not profiles:
        raise SieveError("There is no routing profile. Pass profiles by name.")
    (first, reference), *others = profiles.items()
    for name, profile in others:
        both = f"the profiles {first!r} and {name!r}"
        check_experts_match(reference.counts, profile.counts, both, "Compare profiles of one model.")


def _part(profile: RoutingProfile, fraction: float, generator: np.random.Generator) -> RoutingProfile:
    parts = {}
    for name, counts in profile.counts.items():
        numbers = drawable(counts.numpy())
        size = max(1, round(fraction * int(numbers.sum())))
        parts[name] = torch.from_numpy(generator.multivariate_hypergeometric(numbers, size, method="marginals"))
    return RoutingProfile(counts=parts)
