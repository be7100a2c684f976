"""Which experts to adapt: scores of a routing profile, strategies over the scores, and the selection they make.

Pure functions on numbers. Everything is computed with Python's integers and floats (exact sums, correctly rounded
quotients, sorting by score and then by id), so that a profile gives the same selection on every platform.
"""

from __future__ import annotations

import difflib
import math
import random
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from peft_sieve.errors import SieveError
from peft_sieve.routing.profile_data import RoutingProfile, check_profile, quoted
from peft_sieve.table import Table

ScoreFunction = Callable[[RoutingProfile, str], Tensor]

_SCORES: dict[str, ScoreFunction] = {}


# --- scores ---------------------------------------------------------------------------------------------------------


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
_TOP_P = {"esft_gate": 0.1, "esft_token": 0.2}
# Scores that are no averages: their sum over experts grows with the data.
_TOTALS = ("count", "mass")


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


def _total(values: Sequence[float]) -> float:
    """The sum, exact for integers and correctly rounded for floats whatever their order."""
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)


def _hottest_first(values: Sequence[float]) -> list[int]:
    """Expert ids by falling score, ties by rising id."""
    return sorted(range(len(values)), key=lambda expert: (-values[expert], expert))


# --- strategies -----------------------------------------------------------------------------------------------------
# Each takes the scores of the layers that tokens reached, and the options.

_Scores = Mapping[str, Sequence[float]]
_Selected = Mapping[str, Iterable[int]]


@dataclass(frozen=True)
class _Options:
    """What strategies go by: experts that each layer may have, and the arguments of `select_experts`."""

    budgets: Mapping[str, int]
    coverage: float
    top_p: float
    seed: int


def _uniform(scores: _Scores, options: _Options) -> _Selected:
    return {layer: _hottest_first(values)[: options.budgets[layer]] for layer, values in scores.items()}


def _greedy(scores: _Scores, options: _Options) -> _Selected:
    # An expert's gain is its share of its layer's score, whatever else is selected. So taking the largest gain again
    # and again is the same as one sort, and a layer's experts come in falling order by themselves.
    candidates = [
        (-values[expert] / total, position, expert, layer)
        for position, (layer, values) in enumerate(scores.items())
        for total in [_total(values)]
        for expert in range(len(values))
    ]
    candidates.sort()
    selected = {layer: [_hottest_first(values)[0]] for layer, values in scores.items()}
    remaining = sum(options.budgets[layer] for layer in scores) - len(scores)
    for _, _, expert, layer in candidates:
        if remaining and expert != selected[layer][0]:
            selected[layer].append(expert)
            remaining -= 1
    return selected


def _coverage(scores: _Scores, options: _Options) -> _Selected:
    selected: dict[str, list[int]] = {}
    for layer, values in scores.items():
        total = _total(values)
        selected[layer] = chosen = []
        for expert in _hottest_first(values):
            chosen.append(expert)
            if _total([values[i] for i in chosen]) / total >= options.coverage:
                break
    return selected


def _cumulative(scores: _Scores, options: _Options) -> _Selected:
    selected: dict[str, list[int]] = {}
    for layer, values in scores.items():
        chosen = selected.setdefault(layer, [])
        for expert in _hottest_first(values):
            if _total([values[i] for i in chosen]) >= options.top_p or not values[expert]:
                break
            chosen.append(expert)
    return selected


def _random(scores: _Scores, options: _Options) -> _Selected:
    selected = {}
    for layer, values in scores.items():
        generator = random.Random(f"{options.seed}:{layer}")
        # Of the module's functions only random() is promised to give the same numbers in every Python version.
        draws = [generator.random() for _ in values]
        selected[layer] = _hottest_first(draws)[: options.budgets[layer]]
    return selected


_STRATEGIES = {
    "uniform": _uniform,
    "greedy": _greedy,
    "coverage": _coverage,
    "cumulative": _cumulative,
    "random": _random,
}


def known_strategies() -> tuple[str, ...]:
    """The names that `strategy` can take."""
    return tuple(_STRATEGIES)


# --- the selection --------------------------------------------------------------------------------------------------


class ExpertSelection(Mapping[str, tuple[int, ...]]):
    """The experts to adapt: an immutable mapping from layer name to a tuple of ascending expert ids.

    Equal to any mapping with the same items, whatever their order; can be pickled and copied.

    Args:
        experts: layer name -> expert ids >= 0, each once, in any order. `to_dict()` gives this back.

    Raises:
        SieveError: if a layer's ids are not distinct whole numbers of at least 0.
    """

    __slots__ = ("_experts",)
    _experts: dict[str, tuple[int, ...]]

    def __init__(self, experts: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(experts, Mapping):
            raise SieveError(
                f"received {type(experts).__name__} as selected experts, "
                "expected a mapping from layer name to expert ids: pass a dict"
            )
        checked = {layer: _ascending_ids(layer, ids) for layer, ids in experts.items()}
        object.__setattr__(self, "_experts", checked)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"ExpertSelection cannot be changed, so {name!r} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertSelection, (dict(self._experts),)

    def __getitem__(self, layer: str) -> tuple[int, ...]:
        return self._experts[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def __repr__(self) -> str:
        return f"ExpertSelection({len(self)} layers, {sum(map(len, self.values()))} experts)"

    def to_table(self) -> Table:
        """One row a layer: how many experts are selected, and which."""
        rows = [(layer, str(len(experts)), " ".join(map(str, experts))) for layer, experts in self.items()]
        total = ("all layers", str(sum(map(len, self.values()))), "")
        return Table(("layer", "selected", "expert ids"), rows, total, wrapped=(2,))

    def _repr_html_(self) -> str:
        return self.to_table().to_html()

    def coverage(self, profile: RoutingProfile, score: str = "count") -> dict[str, float]:
        """The share of each layer's score that the selected experts capture (MoE-Sieve §3).

        Args:
            profile: a profile with the selection's layers; it need not be the one that the selection was made from.
            score: the score to share out.

        Returns:
            Layer name -> share in [0, 1] for the selection's layers; 0.0 for a layer that no token reached, because
            nothing was captured there.

        Raises:
            SieveError: if the profile lacks a selected layer or expert, or the score.
        """
        scores = layer_scores(profile, score)
        missing = [layer for layer in self if layer not in scores]
        if missing:
            raise SieveError(
                f"received a profile without {quoted(missing)}, expected every layer of the selection: "
                "use a profile of the same model"
            )
        shares = {}
        for layer, experts in self.items():
            values = scores[layer]
            if experts and experts[-1] >= len(values):
                raise SieveError(
                    f"received a profile with {len(values)} experts in layer {layer!r} where expert {experts[-1]} is "
                    "selected, expected more experts than the largest selected id: use a profile of the same model"
                )
            total = _total(values)
            shares[layer] = _total([values[expert] for expert in experts]) / total if total else 0.0
        return shares

    def hottest_first(self, profile: RoutingProfile, score: str = "count") -> dict[str, list[int]]:
        """The selected experts of each layer by falling score, ties by rising id: the order they were selected in.

        Args:
            profile: a profile with the selection's layers and experts.
            score: the score to sort by.

        Raises:
            SieveError: if the profile lacks a selected layer or expert, or the score.
        """
        self.coverage(profile, score)  # checks that the two go together
        scores = layer_scores(profile, score)
        return {layer: [e for e in _hottest_first(scores[layer]) if e in experts] for layer, experts in self.items()}

    def jaccard(self, other: Mapping[str, Iterable[int]]) -> float:
        """How far two selections agree: the experts of both over the experts of either, as the mean over layers.

        Args:
            other: a selection of the same layers, or a mapping that is one.

        Returns:
            A number in [0, 1]. A layer for which neither selects an expert counts as 1.0, and so do no layers at all.

        Raises:
            SieveError: if the layers differ.
        """
        overlaps = self.layer_jaccard(other).values()
        return math.fsum(overlaps) / len(overlaps) if overlaps else 1.0

    def layer_jaccard(self, other: Mapping[str, Iterable[int]]) -> dict[str, float]:
        """As `jaccard`, layer by layer: layer name -> a number in [0, 1], in the selection's order."""
        theirs = other if isinstance(other, ExpertSelection) else ExpertSelection(other)
        only_one = sorted(set(self) ^ set(theirs))
        if only_one:
            raise SieveError(
                f"received two selections of which only one has {quoted(only_one)}, "
                "expected the same layers in both: compare selections for the same model"
            )
        overlaps = {}
        for layer, experts in self.items():
            either = set(experts) | set(theirs[layer])
            overlaps[layer] = len(set(experts) & set(theirs[layer])) / len(either) if either else 1.0
        return overlaps

    def to_dict(self) -> dict[str, list[int]]:
        """The selection as plain lists, ready for JSON and for `SieveLoraConfig(selected_experts=...)`."""
        return {layer: list(experts) for layer, experts in self.items()}


def select_experts(
    profile: RoutingProfile,
    *,
    top_k_frac: float = 0.25,
    top_k: int | None = None,
    strategy: str = "uniform",
    score: str = "count",
    coverage: float = 0.6,
    seed: int = 0,
    top_p: float | None = None,
) -> ExpertSelection:
    """Select the experts to adapt in each layer (MoE-Sieve; greedy: Appendix C, random: §6).

    A layer's budget is `max(1, round(top_k_frac * num_experts))` or `top_k`. Experts with equal scores are taken in
    the order of their ids. A layer that no token reached, or whose score is 0 for all experts, gets no experts and is
    named in a `UserWarning`.

    Args:
        profile: what the router did on the calibration data.
        top_k_frac: share of a layer's experts, in (0, 1].
        top_k: number of experts a layer, from 1 to the smallest layer's number of experts; wins over `top_k_frac`.
        strategy: `uniform`: each layer's highest scores, as many as its budget. `greedy`: as many in all as `uniform`
            takes, given out one by one to the expert with the largest share of its own layer's score, ties to the
            earlier layer, and at least one a layer. `coverage`: the fewest of each layer that hold the share
            `coverage` of its score; no budget. `cumulative`: each layer's highest scores until their sum, not their
            share, reaches `top_p`, the expert that reaches it included; no budget; for scores that are averages
            (ESFT, arXiv 2407.01906). `random`: as many as `uniform` but drawn with `seed`, a control.
        score: `count` (tokens routed), `mass` (summed gate weight), `esft_gate` or `esft_token` (gate weight, or
            1/top-k of each selection, as the mean over samples of the mean over a sample's tokens), or a name given to
            `register_score`.
        coverage: target of the strategy `coverage`, in (0, 1].
        seed: of the strategy `random`, any whole number; each layer's draw depends on it and the layer's name, and
            neither uses nor changes the state of a global generator.
        top_p: target of the strategy `cumulative`, in (0, 1]; None is 0.1 for `esft_gate` and 0.2 for `esft_token`.

    Returns:
        The selection, with all layers of the profile in their order.

    Raises:
        SieveError: if an option is out of range, the profile lacks the score, or no token reached any layer.
    """
    validate_selection_options(top_k_frac, top_k, strategy, score, coverage, top_p)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise SieveError(f"received seed={reprlib.repr(seed)}, expected a whole number: pass one such as 0")
    scores = layer_scores(profile, score)
    budgets = {layer: experts_per_layer(len(values), top_k_frac, top_k) for layer, values in scores.items()}
    for layer, values in scores.items():
        if budgets[layer] > len(values):
            raise SieveError(
                f"received top_k={top_k} for layer {layer!r} of {len(values)} experts, "
                "expected no more than every layer has: lower top_k or use top_k_frac"
            )
    reached = {
        layer: values for layer, values in scores.items() if bool(profile.counts[layer].any()) and _total(values) > 0
    }
    unreached = [layer for layer in scores if layer not in reached]
    weightless = any(bool(profile.counts[layer].any()) for layer in unreached)
    no_token = f"no token with a {score} above 0" if weightless else "no token"
    if not reached:
        raise SieveError(
            f"received a profile in which {no_token} reached any of the {len(scores)} layers, "
            "expected routed tokens in at least one: profile on calibration data that is not empty"
        )
    if unreached:
        warnings.warn(
            f"{no_token} reached {quoted(unreached)}, so no expert is selected there: "
            "profile on more data if these layers should be adapted",
            UserWarning,
            stacklevel=2,
        )
    options = _Options(budgets, float(coverage), float(top_p or _TOP_P.get(score, 1.0)), int(seed))
    if strategy == "cumulative":
        _warn_of_small_sums(reached, score, options.top_p)
    selected = _STRATEGIES[strategy](reached, options)
    return ExpertSelection({layer: selected.get(layer, ()) for layer in scores})


def _warn_of_small_sums(scores: _Scores, score: str, top_p: float) -> None:
    small = [layer for layer, values in scores.items() if _total(values) < top_p]
    if small:
        warnings.warn(
            f"the {score} of all experts together stays below top_p={top_p:g} in {quoted(small)}, so that every expert "
            "with a score above 0 is selected there: lower top_p if fewer should be adapted",
            UserWarning,
            stacklevel=3,
        )


def hottest_experts(profile: RoutingProfile, sizes: Mapping[str, int], *, score: str = "count") -> ExpertSelection:
    """The experts with the highest scores, as many of each layer as `sizes` says; ties to the lower id.

    Args:
        profile: what the router did; it must have the layers of `sizes`.
        sizes: layer name -> number of experts.
        score: as for `select_experts`.

    Returns:
        The selection, in the order of `sizes`; nothing in a layer whose score is 0 for all experts.
    """
    scores = layer_scores(profile, score)
    return ExpertSelection(
        {layer: _hottest_first(scores[layer])[:size] if any(scores[layer]) else () for layer, size in sizes.items()}
    )


# --- options --------------------------------------------------------------------------------------------------------


def validate_selection_options(
    top_k_frac: Any, top_k: Any, strategy: Any, score: Any, coverage: Any, top_p: Any = None
) -> None:
    """Check the options of `select_experts` as far as that is possible without a profile.

    Args:
        top_k_frac: must be a number in (0, 1].
        top_k: must be None or a whole number of at least 1.
        strategy: must be one of `known_strategies()`.
        score: must be one of `known_scores()`.
        coverage: must be a number in (0, 1].
        top_p: must be None or a number in (0, 1].

    Raises:
        SieveError: for the first option that is not so. All are checked, also those that the strategy does not use.
    """
    check_share("top_k_frac", top_k_frac, "the share of each layer's experts to adapt, such as 0.25")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1):
        raise SieveError(
            f"received top_k={reprlib.repr(top_k)}, expected a whole number of at least 1 or None: "
            "set it to the number of experts to adapt in each layer, or use top_k_frac for a share"
        )
    _check_name("strategy", strategy, _STRATEGIES)
    check_score(score)
    check_share("coverage", coverage, "the share of each layer's score to capture, such as 0.6")
    if top_p is not None:
        check_share("top_p", top_p, "the sum of scores to reach in each layer, such as 0.2, or to None")
    if strategy == "cumulative" and score in _TOTALS:
        raise SieveError(
            f"received strategy='cumulative' with score={score!r}, expected a score that is an average, since sums of "
            "this one grow with the data: use score='esft_token' or 'esft_gate', or strategy='coverage' for a share"
        )
    if strategy == "cumulative" and top_p is None and score not in _TOP_P:
        raise SieveError(
            f"received strategy='cumulative' with score={score!r} and no top_p, expected a number above 0 and at most "
            "1: set it to the sum of scores to reach in each layer"
        )


def check_score(score: Any) -> None:
    """Raise `SieveError` unless `score` is the name of a registered score."""
    _check_name("score", score, _SCORES)


def experts_per_layer(num_experts: int, top_k_frac: float, top_k: int | None = None) -> int:
    """How many experts of a layer to select: `top_k` if given, else `max(1, round(top_k_frac * num_experts))`."""
    return max(1, round(float(top_k_frac) * num_experts)) if top_k is None else int(top_k)


def check_share(option: str, value: Any, advice: str) -> None:
    """Raise `SieveError` unless `value` is a number in (0, 1]; `advice` says what to set `option` to."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise SieveError(
            f"received {option}={reprlib.repr(value)}, expected a number above 0 and at most 1: set it to {advice}"
        )


def _check_name(option: str, value: Any, known: Iterable[str]) -> None:
    names = list(known)
    if isinstance(value, str) and value in names:
        return
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    advice = f"did you mean {near[0]!r}?" if near else "choose one of them"
    raise SieveError(f"received {option}={reprlib.repr(value)}, expected one of {quoted(names)}: {advice}")


def _ascending_ids(layer: Any, ids: Any) -> tuple[int, ...]:
    if not isinstance(layer, str) or isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise SieveError(
            f"received {reprlib.repr(layer)}: {reprlib.repr(ids)} as selected experts, "
            "expected a layer name and a list of expert ids: pass a dict from names to lists"
        )
    experts = list(ids)
    whole = all(
        isinstance(expert, Integral) and not isinstance(expert, bool) and int(expert) >= 0 for expert in experts
    )
    if not whole or len(set(experts)) != len(experts):
        raise SieveError(
            f"received {reprlib.repr(experts)} as the experts of layer {layer!r}, "
            "expected distinct whole numbers of at least 0: name each expert once by its id"
        )
    return tuple(sorted(int(expert) for expert in experts))
