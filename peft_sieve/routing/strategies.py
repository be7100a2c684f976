"""The strategies by which experts are selected: pure functions of the scores of the layers that tokens reached."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .scores import hottest_first, total_of

Scores = Mapping[str, Sequence[float]]
Selected = Mapping[str, Iterable[int]]


@dataclass(frozen=True)
class Targets:
    """What strategies go by: experts that each layer may have, and the arguments of `select_experts`."""

    budgets: Mapping[str, int]
    coverage: float
    top_p: float
    seed: int


def _uniform(scores: Scores, targets: Targets) -> Selected:
    return {layer: hottest_first(values)[: targets.budgets[layer]] for layer, values in scores.items()}


def _greedy(scores: Scores, targets: Targets) -> Selected:
    # An expert's gain is its share of its layer's score, whatever else is selected. So taking the largest gain again
    # and again is the same as one sort, and a layer's experts come in falling order by themselves.
    candidates = [
        (-values[expert] / total, position, expert, layer)
        for position, (layer, values) in enumerate(scores.items())
        for total in [total_of(values)]
        for expert in range(len(values))
    ]
    candidates.sort()
    selected = {layer: [hottest_first(values)[0]] for layer, values in scores.items()}
    remaining = sum(targets.budgets[layer] for layer in scores) - len(scores)
    for _, _, expert, layer in candidates:
        if remaining and expert != selected[layer][0]:
            selected[layer].append(expert)
            remaining -= 1
    return selected


def _coverage(scores: Scores, targets: Targets) -> Selected:
    selected: dict[str, list[int]] = {}
    for layer, values in scores.items():
        total = total_of(values)
        selected[layer] = chosen = []
        for expert in hottest_first(values):
            chosen.append(expert)
            if total_of([values[i] for i in chosen]) / total >= targets.coverage:
                break
    return selected


def _cumulative(scores: Scores, targets: Targets) -> Selected:
    selected: dict[str, list[int]] = {}
    for layer, values in scores.items():
        chosen = selected.setdefault(layer, [])
        for expert in hottest_first(values):
            if total_of([values[i] for i in chosen]) >= targets.top_p or not values[expert]:
                break
            chosen.append(expert)
    return selected


def _random(scores: Scores, targets: Targets) -> Selected:
    selected = {}
    for layer, values in scores.items():
        generator = random.Random(f"{targets.seed}:{layer}")
        # Of the module's functions only random() is promised to give the same numbers in every Python version.
        draws = [generator.random() for _ in values]
        selected[layer] = hottest_first(draws)[: targets.budgets[layer]]
    return selected


STRATEGIES: dict[str, Callable[[Scores, Targets], Selected]] = {
    "uniform": _uniform,
    "greedy": _greedy,
    "coverage": _coverage,
    "cumulative": _cumulative,
    "random": _random,
}


def known_strategies() -> tuple[str, ...]:
    """The names that `strategy` can take."""
    return tuple(STRATEGIES)
