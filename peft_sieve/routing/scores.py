"""The scores of a routing profile by which experts are selected.

Everything is computed with Python's integers and floats (exact sums, correctly rounded quotients, sorting by score and
then by id), so that a profile gives the same selection on every platform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import choice, must_be
from ..errors import SieveError
from .profile import RoutingProfile, check_profile

ScoreFunction = Callable[[RoutingProfile, str], Tensor]

_SCORES: dict[str, ScoreFunction] = {}


def register_score(name: str, function: ScoreFunction) -> None:
    """Add a score by which experts can be selected, or replace the one of that name.

    Args:
        name: how `select_experts(score=...)` and `SieveLoraConfig(score=...)` call it.
        function: called as `function(profile, layer_name)`; returns one score per expert, `(num_experts,)`, integer or
            floating, finite and >= 0, higher for experts that the task uses more. It should depend on its arguments
            only. It raises `SieveError` if the profile lacks what it needs.

    Raises:
        SieveError: if the name is not a non-empty string or the function cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise must_be("The name of a score", "a non-empty string", name)
    if not callable(function):
        raise must_be(f"The score {name!r}", "a function of a profile and a layer name", function)
    _SCORES[name] = function


def _register_held(score: str, field: str) -> None:
    """A score that the profile holds already."""

    def function(profile: RoutingProfile, layer: str) -> Tensor:
        values: dict[str, Tensor] | None = getattr(profile, field)
        if values is None:
            raise SieveError(f"score={score!r} needs a profile with {field}. Profile again, or use score='count'.")
        return values[layer]

    register_score(score, function)


_register_held("count", "counts")
_register_held("mass", "mass")
# ESFT (arXiv 2407.01906): the mean over samples of a sample's mean over tokens, of the gate weight or of 1/top-k for
# each selected expert.
_register_held("esft_gate", "sample_mass")
_register_held("esft_token", "sample_share")

# What `cumulative` adds up to, if nothing else is said (ESFT §4).
TOP_P = {"esft_gate": 0.1, "esft_token": 0.2}
# Scores that are not averages: their sum over experts grows with the data.
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
            kind = f"{counts.numel()} finite numbers of at least 0 for layer {layer!r}"
            raise must_be(f"What the score {score!r} returns", kind, values.tolist())
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
    choice("score", score, _SCORES)
