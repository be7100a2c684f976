"""Calibration that knows when to stop: profile growing halves of the data until both select the same experts."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from ..checks import must_be, quoted, share
from .data.batches import CalibrationData
from .distributed import gathered, on_every_rank, summed
from .profile import RoutingProfile
from .stability import selection_stability
from .strategies import SelectionOptions


@dataclass(frozen=True)
class StabilityRule:
    """When a selection counts as stable.

    Attributes:
        threshold: least Jaccard similarity, in (0, 1], of what two halves of the data select, in every layer.
        selection: keyword arguments of `select_experts`.
        seed: of the order in which batches are taken.
    """

    threshold: float
    selection: Mapping[str, Any]
    seed: int

    def __post_init__(self) -> None:
        share("stability", self.threshold)
        known = {option.name for option in fields(SelectionOptions)}
        if not isinstance(self.selection, Mapping) or not set(self.selection) <= known:
            raise must_be("selection", f"a mapping with some of {quoted(sorted(known))}", self.selection)
        SelectionOptions(**self.selection)

    def measured(self, first: RoutingProfile, second: RoutingProfile) -> dict[str, float]:
        """Layer name -> agreement; 0 everywhere if either half reached no layer at all, which shows nothing."""
        if not all(any(layer.any() for layer in half.counts.values()) for half in (first, second)):
            return dict.fromkeys(first.counts, 0.0)
        with warnings.catch_warnings():
            # A layer without tokens: what is selected in the end will say so once.
            warnings.simplefilter("ignore", UserWarning)
            return selection_stability(first, second, **self.selection)

    def unstable(self, agreement: Mapping[str, float]) -> dict[str, float]:
        """The layers below the threshold."""
        return {layer: value for layer, value in agreement.items() if value < self.threshold}


@dataclass(frozen=True)
class StableProfile:
    """What was profiled when it stopped.

    Attributes:
        profile: this process's counts; its metadata hold `stability` and `stability_threshold`.
        data: this process's batches that were used.
        stability: layer name -> Jaccard similarity of what the two halves select, over all processes.
    """

    profile: RoutingProfile
    data: CalibrationData
    stability: dict[str, float]


def profile_until(
    rule: StabilityRule,
    count: Callable[[CalibrationData], RoutingProfile],
    calibration: CalibrationData,
    *,
    together: bool = False,
) -> StableProfile:
    """Count batch after batch until both halves of them agree, or no batch is left; that gives a `UserWarning`.

    Batches come in random order, for they are sorted by length, and go to the halves in turns. The halves are compared
    whenever the number of batches has doubled: a comparison after each would sooner or later succeed by chance.

    Args:
        rule: when to stop.
        count: profiles a part of the data.
        calibration: this process's share of the data.
        together: whether all processes of `torch.distributed` call this; they stop at the same time.
    """
    batches = list(calibration.batches)
    random.Random(rule.seed).shuffle(batches)

    def halves_of(new: list[dict[str, Any]]) -> list[RoutingProfile]:
        return [count(calibration.part(new[turn::2])) for turn in (0, 1)]

    most = max(gathered(len(batches))) if together else len(batches)
    halves: list[RoutingProfile] = []
    done, target = 0, 2
    while True:
        new = batches[done:target]
        counted = on_every_rank(partial(halves_of, new)) if together else halves_of(new)
        halves = [half + more for half, more in zip(halves, counted, strict=True)] if halves else counted
        first, second = map(summed, halves) if together else halves
        agreement = rule.measured(first, second)
        done = min(target, most)
        if done == most or not rule.unstable(agreement):
            break
        target *= 2
    if most < 2:
        warnings.warn(
            f"The calibration data {calibration.name!r} are a single batch, which has no halves to compare. Pass more "
            "data, or lower batch_size (calib_batch_size).",
            UserWarning,
        )
    elif rule.unstable(agreement):
        _warn_of_instability(rule, agreement, calibration.name, (first + second).num_tokens)
    used = calibration.part(batches[:done])
    metadata = counted[0].metadata | {"samples": used.num_samples, "tokens": used.num_tokens}
    metadata |= {"stability": agreement, "stability_threshold": rule.threshold}
    return StableProfile(replace(halves[0] + halves[1], metadata=metadata), used, agreement)


def _warn_of_instability(
    rule: StabilityRule, agreement: Mapping[str, float], name: str, num_tokens: int | None
) -> None:
    below = rule.unstable(agreement)
    lowest = min(below, key=lambda layer: below[layer])
    warnings.warn(
        f"The calibration data {name!r} ended after {num_tokens:,} tokens, before the selection was stable: their "
        f"halves agree on less than {rule.threshold:g} of the experts in {len(below)} of {len(agreement)} layers, "
        f"least in {lowest!r} with {below[lowest]:.2f}. Pass more data, or raise max_samples (calib_samples).",
        UserWarning,
    )
