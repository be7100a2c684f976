"""How sure a selection is: would other data of the same kind select the same experts?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..checks import must_be, whole
from ..errors import SieveError
from .profile import RoutingProfile, check_profile
from .selection import select_experts

# numpy draws without replacement from fewer than these.
_MOST_DISPATCHES = 10**9


def selection_stability(first: RoutingProfile, second: RoutingProfile, **selection: Any) -> dict[str, float]:
    """How far two profiles, such as those of two halves of a data set, select the same experts.

    Args:
        first: a profile.
        second: another one of the same model.
        **selection: keyword arguments of `select_experts`.

    Returns:
        Layer name -> Jaccard similarity of the selected experts in [0, 1]: 1 where both select the same, also where
        neither selects any because no token reached the layer.

    Raises:
        SieveError: if the layers differ, no token reached any layer of either, or an option is out of range.
    """
    return select_experts(first, **selection).layer_jaccard(select_experts(second, **selection))


def subsample_stability(
    profile: RoutingProfile, num_tokens: Iterable[int], *, repeats: int = 20, seed: int = 0, **selection: Any
) -> dict[int, dict[str, float]]:
    """How far two calibrations of so many tokens each would agree, judged from a profile of many more.

    Draws two disjoint sets of tokens' dispatches from the profile's counts and compares what they select, again and
    again. Dispatches are drawn one by one, so the tokens count as independent. Those of one text are not: real
    calibrations agree less, and the numbers of tokens found here are the least that could be enough.

    Args:
        profile: what the router did, with `num_experts_per_tok` known.
        num_tokens: sizes of a calibration, each >= 1 and at most half of the profile's tokens.
        repeats: pairs of calibrations drawn for each size, >= 1.
        seed: of the draws, a whole number >= 0.
        **selection: keyword arguments of `select_experts`; a score that needs gate weights cannot be used, for draws
            have only counts.

    Returns:
        Number of tokens -> layer name -> mean Jaccard similarity in [0, 1], sizes in the order given. Layers that no
        token reached are left out.

    Raises:
        SieveError: if a value is out of range or the profile lacks what is needed.
    """
    check_profile(profile)
    top_k = profile.num_experts_per_tok
    if top_k is None:
        raise SieveError(
            "The profile has no num_experts_per_tok, which turns tokens into dispatches. Pass it to "
            "RoutingProfile.from_arrays."
        )
    repeats, seed = whole("repeats", repeats), whole("seed", seed, least=0)
    counts = {layer: values.numpy() for layer, values in profile.counts.items() if bool(values.any())}
    if not counts:
        raise SieveError("No token reached any layer of the profile. Profile on calibration data that is not empty.")
    largest = min(int(values.sum()) for values in counts.values()) // (2 * top_k)
    if not isinstance(num_tokens, Iterable) or isinstance(num_tokens, str):
        raise must_be("num_tokens", "a list of numbers of tokens", num_tokens)
    found = {}
    for size in num_tokens:
        size = whole("num_tokens", size)
        if size > largest:
            kind = f"at most {largest}, half of the tokens of the least used layer"
            raise must_be("num_tokens", kind, size, "Two sets are drawn that share no token.")
        generator = np.random.default_rng([seed, size])  # a size's result does not depend on the others
        agreement = dict.fromkeys(counts, 0.0)
        for _ in range(repeats):
            pair = _two_draws(counts, size * top_k, generator)
            for layer, value in selection_stability(*pair, **selection).items():
                agreement[layer] += value / repeats
        found[size] = agreement
    return found


def _two_draws(
    counts: dict[str, np.ndarray], dispatches: int, generator: np.random.Generator
) -> tuple[RoutingProfile, RoutingProfile]:
    """Two disjoint sets of a profile's dispatches, without replacement."""
    first, second = [], []
    for values in map(drawable, counts.values()):
        # Half of what was halved is still a draw of a hundred million, which agrees like any larger one.
        size = min(dispatches, int(values.sum()) // 2)
        first.append(generator.multivariate_hypergeometric(values, size, method="marginals"))
        second.append(generator.multivariate_hypergeometric(values - first[-1], size, method="marginals"))
    names = tuple(counts)
    return RoutingProfile.from_arrays(first, layer_names=names), RoutingProfile.from_arrays(second, layer_names=names)


def drawable(counts: np.ndarray) -> np.ndarray:
    """A layer's counts, halved until their sum is one that can be drawn from; shares stay what they are."""
    while counts.sum() >= _MOST_DISPATCHES:
        counts = counts // 2
    return counts
