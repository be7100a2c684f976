"""The options of `select_experts`, checked as far as that is possible without a profile."""

from __future__ import annotations

import reprlib
from numbers import Integral, Real
from typing import Any

from ..errors import SieveError
from .scores import TOP_P, TOTALS, check_name, check_score
from .strategies import STRATEGIES


def validate_selection_options(
    top_k_frac: Any, top_k: Any, strategy: Any, score: Any, coverage: Any, top_p: Any = None, check_scores: bool = True
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
    check_name("strategy", strategy, STRATEGIES)
    if check_scores:
        check_score(score)
    check_share("coverage", coverage, "the share of each layer's score to capture, such as 0.6")
    if top_p is not None:
        check_share("top_p", top_p, "the sum of scores to reach in each layer, such as 0.2, or to None")
    if strategy == "cumulative" and score in TOTALS:
        raise SieveError(
            f"received strategy='cumulative' with score={score!r}, expected a score that is an average, since sums of "
            "this one grow with the data: use score='esft_token' or 'esft_gate', or strategy='coverage' for a share"
        )
    if check_scores and strategy == "cumulative" and top_p is None and score not in TOP_P:
        raise SieveError(
            f"received strategy='cumulative' with score={score!r} and no top_p, expected a number above 0 and at most "
            "1: set it to the sum of scores to reach in each layer"
        )


def experts_per_layer(num_experts: int, top_k_frac: float, top_k: int | None = None) -> int:
    """How many experts of a layer to select: `top_k` if given, else `max(1, round(top_k_frac * num_experts))`."""
    return max(1, round(float(top_k_frac) * num_experts)) if top_k is None else int(top_k)


def check_share(option: str, value: Any, advice: str) -> None:
    """Raise `SieveError` unless `value` is a number in (0, 1]; `advice` says what to set `option` to."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise SieveError(
            f"received {option}={reprlib.repr(value)}, expected a number above 0 and at most 1: set it to {advice}"
        )
