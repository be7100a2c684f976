"""The scores of a routing profile by which experts are selected.

Everything is computed with Python's integers and floats (exact sums, correctly rounded quotients, sorting by score and
then by id), so that a profile gives the same selection on every platform.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SieveError
from .profile import RoutingProfile, check_profile
from .profile_checks import quoted

ScoreFunction = Callable[[RoutingProfile, str], Tensor]

_SCORES: dict[str, ScoreFunction] = {}


def register_score(name: str, function: ScoreFunction) -> None:
    """Add a score by which experts can be selected, or replace the one of that name.

    Args:
        name: how `select_experts(score=...)` and `SieveLoraConfig(score=...)` call it.
        function: called as `function(profile, layer_name)`; returns one score an expert, `(num_experts,)`, integer or
            floating, finite and >= 0, higher for experts that the task uses more. It should depend on its arguments
            only. It raises `SieveError` if the profile lacks what it needs.

    Raises:
        SieveError: if the name is not a non-empty string or the function cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise SieveError(f"received {reprlib.repr(name)} as the name of a score, expected a non-empty string: name it")
    if not callable(function):
        raise SieveError(
            f"received {reprlib.repr(function)} as the score {name!r}, expected a function of a profile and a layer "
            "name: pass the function itself"
        )
    _SCORES[name] = function


def known_scores() -> tuple[str, ...]:
    """The names that `score` can take, in the order of their registration."""
    return tuple(_SCORES)


def _count(profile: RoutingProfile, layer: str) -> Tensor:
    """Tokens routed to each expert (MoE-Sieve §3)."""
    return profile.counts[layer]


def _mass(profile: RoutingProfile, layer: str) -> Tensor:
    """Gate weight given to each expert, summed over tokens (MoE-Sieve §3)."""
    if profile.mass is None:
        raise SieveError(
            "received score='mass' for a profile that holds no gate weights, expected a profile with mass: "
            "profile again with gate weights or use score='count'"
        )
    return profile.mass[layer]


def _esft(what: str, score: str) -> ScoreFunction:
    def function(profile: RoutingProfile, layer: str) -> Tensor:
        averages: dict[str, Tensor] | None = getattr(profile, what)
        if averages is None:
            raise SieveError(
                f"received score={score!r} for a profile without averages over samples ({what}), expected one with "
                "them: profile again with this release, or use score='count' or 'mass'"
            )
        return averages[layer]

    return function


register_score("count", _count)
register_score("mass", _mass)
# ESFT (arXiv 2407.01906): the mean over samples of a sample's mean over tokens, of the gate weight or of 1/top-k for
# each selected expert.
register_score("esft_gate", _esft("sample_mass", "esft_gate"))
register_score("esft_token", _esft("sample_share", "esft_token"))

# What `cumulative` adds up to, if nothing else is said (ESFT §4).
TOP_P = {"esft_gate": 0.1, "esft_token": 0.2}
# Scores that are no averages: their sum over experts grows with the data.
TOTALS = ("count", "mass")


def layer_scores(profile: RoutingProfile, score: str) -> dict[str, list[float]]:
    """The score of every expert, layer by layer, as integers or floats.

    Raises:
        SieveError: if no score has that name, or the profile lacks what it needs.
    """
    check_profile(profile)
    check_score(score)
    scores = {}
    for layer, counts in profile.counts.items():
        values = torch.as_tensor(_SCORES[score](profile, layer)).detach().cpu()
        if values.shape != counts.shape or bool((values < 0).any()) or not bool(torch.isfinite(values).all()):
            raise SieveError(
                f"received from the score {score!r} values of shape {tuple(values.shape)} for layer {layer!r}, "
                f"expected {counts.numel()} finite numbers of at least 0: correct the registered function"
            )
        scores[layer] = values.tolist()
    return scores


def total_of(values: Sequence[float]) -> float:
    """The sum, exact for integers and correctly rounded for floats whatever their order."""
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)


def hottest_first(values: Sequence[float]) -> list[int]:
    """Expert ids by falling score, ties by rising id."""
    return sorted(range(len(values)), key=lambda expert: (-values[expert], expert))


def check_score(score: Any) -> None:
    """Raise `SieveError` unless `score` is the name of a registered score."""
    check_name("score", score, _SCORES)


def check_name(option: str, value: Any, known: Iterable[str]) -> None:
    names = list(known)
    if isinstance(value, str) and value in names:
        return
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    advice = f"did you mean {near[0]!r}?" if near else "choose one of them"
    raise SieveError(f"received {option}={reprlib.repr(value)}, expected one of {quoted(names)}: {advice}")
