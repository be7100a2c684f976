"""How sure a selection is: would other data of the same kind select the same experts?"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np

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
            "received a profile without num_experts_per_tok, expected the router's top-k, which turns tokens into "
            "dispatches: pass it to RoutingProfile.from_arrays"
        )
    _check_whole("repeats", repeats, 1)
    _check_whole("seed", seed, 0)
    counts = {layer: values.numpy() for layer, values in profile.counts.items() if bool(values.any())}
    if not counts:
        raise SieveError(
            "received a profile in which no token reached any layer, expected routed tokens to draw from: profile on "
            "calibration data that is not empty"
        )
    largest = min(int(values.sum()) for values in counts.values()) // (2 * top_k)
    if not isinstance(num_tokens, Iterable) or isinstance(num_tokens, str):
        raise SieveError(
            f"received num_tokens={num_tokens!r}, expected a list of numbers of tokens: pass one as [1000]"
        )
    found = {}
    for size in num_tokens:
        _check_whole("num_tokens", size, 1)
        if size > largest:
            raise SieveError(
                f"received num_tokens={size} for a profile whose least used layer has {2 * largest} tokens, expected "
                f"at most half of them, {largest}, since two sets are drawn: ask for fewer"
            )
        generator = np.random.default_rng([int(seed), int(size)])  # a size's result does not depend on the others
        agreement = dict.fromkeys(counts, 0.0)
        for _ in range(repeats):
            pair = _two_draws(counts, int(size) * top_k, generator)
            for layer, value in selection_stability(*pair, **selection).items():
                agreement[layer] += value / repeats
        found[int(size)] = agreement
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


def _check_whole(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SieveError(f"received {what}={value!r}, expected a whole number of at least {least}: pass one")
