"""How many experts of each layer to select, and which: the options of `select_experts` and the strategies.

A new strategy is a function here, named in `STRATEGIES`. A new option is a field of `SelectionOptions`, with its check,
and an argument of `select_experts`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from ..checks import choice, must_be, quoted, share, whole
from ..errors import SieveError
from .scores import TOP_P, TOTALS, check_score, hottest_first, total_of

Scores = Mapping[str, Sequence[float]]  # of the layers that tokens reached
Selected = Mapping[str, Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """The options of `select_experts`, which says what they mean, checked as far as no profile is needed for it.

    Args:
        check_scores: False if nothing is selected any more, as with a saved mask: `score` need not be registered then.

    Raises:
        SieveError: for the first option that is out of range. All are checked, also those that the strategy ignores.
    """

    top_k_frac: float = 0.25
    top_k: int | None = None
    strategy: str = "uniform"
    score: str = "count"
    coverage: float = 0.6
    top_p: float | None = None
    seed: int = 0
    check_scores: InitVar[bool] = True

    def __post_init__(self, check_scores: bool) -> None:
        plain = {
            "top_k_frac": share("top_k_frac", self.top_k_frac),
            "top_k": whole("top_k", self.top_k, optional=True),
            "coverage": share("coverage", self.coverage),
            "top_p": share("top_p", self.top_p, optional=True),
            "seed": whole("seed", self.seed, least=None),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        choice("strategy", self.strategy, STRATEGIES)
        if check_scores:
            check_score(self.score)
        elif not isinstance(self.score, str) or not self.score:
            raise must_be("score", "a non-empty string", self.score)
        if self.strategy == "cumulative":
            _check_cumulative(self)

    def budget(self, num_experts: int) -> int:
        """How many experts of a layer to select, where the strategy goes by numbers."""
        return experts_per_layer(num_experts, self.top_k_frac, self.top_k)


def validate_selection_options(*, check_scores: bool = True, **options: Any) -> None:
    """Check options of `select_experts`, by name, as far as that is possible without a profile.

    Args:
        check_scores: False for a saved mask, which may have been selected by a score that is not registered here: then
            `score` must only be a non-empty string.

    Raises:
        SieveError: for the first option that is out of range, whether the strategy uses it or not.
    """
    SelectionOptions(**options, check_scores=check_scores)


def experts_per_layer(num_experts: int, top_k_frac: float, top_k: int | None = None) -> int:
    """How many experts of a layer to select: `top_k` if given, else `max(1, round(top_k_frac * num_experts))`."""
    return max(1, round(float(top_k_frac) * num_experts)) if top_k is None else int(top_k)


def _uniform(scores: Scores, options: SelectionOptions) -> Selected:
    return {layer: hottest_first(values)[: options.budget(len(values))] for layer, values in scores.items()}


def _greedy(scores: Scores, options: SelectionOptions) -> Selected:
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
    remaining = sum(options.budget(len(values)) for values in scores.values()) - len(scores)
    for _, _, expert, layer in candidates:
        if remaining and expert != selected[layer][0]:
            selected[layer].append(expert)
            remaining -= 1
    return selected


def _up_to_coverage(scores: Scores, options: SelectionOptions) -> Selected:
    selected: dict[str, list[int]] = {}
    for layer, values in scores.items():
        total = total_of(values)
        selected[layer] = chosen = []
        for expert in hottest_first(values):
            chosen.append(expert)
            if total_of([values[i] for i in chosen]) / total >= options.coverage:
                break
    return selected


def _cumulative(scores: Scores, options: SelectionOptions) -> Selected:
    top_p = options.top_p or TOP_P[options.score]
    small = [layer for layer, values in scores.items() if total_of(values) < top_p]
    if small:
        warnings.warn(
            f"The {options.score} of all experts together is below top_p={top_p:g} in {quoted(small)}, so every expert "
            "with a score above 0 is selected there. Lower top_p to adapt fewer.",
            UserWarning,
            stacklevel=3,
        )
    selected: dict[str, list[int]] = {}
    for layer, values in scores.items():
        chosen = selected.setdefault(layer, [])
        for expert in hottest_first(values):
            if total_of([values[i] for i in chosen]) >= top_p or not values[expert]:
                break
            chosen.append(expert)
    return selected


def _check_cumulative(options: SelectionOptions) -> None:
    if options.score in TOTALS:
        raise SieveError(
            f"strategy='cumulative' needs a score that is an average, got score={options.score!r}, whose sum grows "
            "with the data. Use score='esft_token' or 'esft_gate', or strategy='coverage'."
        )
    if options.top_p is None and options.score not in TOP_P:
        raise SieveError(f"strategy='cumulative' with score={options.score!r} needs a top_p. Set it, e.g. to 0.2.")


def _random(scores: Scores, options: SelectionOptions) -> Selected:
    selected = {}
    for layer, values in scores.items():
        generator = random.Random(f"{options.seed}:{layer}")
        # Of the module's functions only random() is promised to give the same numbers in every Python version.
        draws = [generator.random() for _ in values]
        selected[layer] = hottest_first(draws)[: options.budget(len(values))]
    return selected


STRATEGIES: dict[str, Callable[[Scores, SelectionOptions], Selected]] = {
    "uniform": _uniform,
    "greedy": _greedy,
    "coverage": _up_to_coverage,
    "cumulative": _cumulative,
    "random": _random,
}
