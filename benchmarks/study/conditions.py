"""Which experts each condition trains. Attention and router are trained in all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft_sieve import RoutingProfile, select_experts

from .settings import Settings

Mask = Mapping[str, list[int]]


@dataclass(frozen=True)
class Condition:
    """One way to choose.

    Attributes:
        name: in the rows.
        label: in tables and figures.
        choose: (profile, seed) -> layer -> ids of the experts that have an adapter.
        per_step: all experts have one, and each step changes only those of the `Settings.hot` share that its own batch
            was routed to most.
    """

    name: str
    label: str
    choose: Callable[[RoutingProfile, int], Mask]
    per_step: bool = False


def conditions(settings: Settings) -> dict[str, Condition]:
    hot = settings.hot
    listed = [
        Condition("all", "all experts (full LoRA)", partial(_selected, top_k_frac=1.0)),
        Condition("hot_25", "hot 25%", partial(_selected, top_k_frac=hot)),
        Condition("random_25", "random 25%", partial(_selected, top_k_frac=hot, strategy="random")),
        Condition("none", "no expert", _no_expert),
        Condition("hot_6", "hot 6%", partial(_selected, top_k_frac=0.0625)),
        Condition("hot_12", "hot 12%", partial(_selected, top_k_frac=0.125)),
        Condition("hot_50", "hot 50%", partial(_selected, top_k_frac=0.5)),
        Condition("greedy_25", "greedy, 25% in all", partial(_selected, top_k_frac=hot, strategy="greedy")),
        Condition("coverage_60", "coverage 60%", partial(_selected, strategy="coverage", coverage=0.6)),
        Condition("mass_25", "hot 25% by gate mass", partial(_selected, top_k_frac=hot, score="mass")),
        Condition("hot_25_cold_25", "hot 25% + 25% of the cold half", partial(_hot_and_cold, share=hot)),
        Condition("step_25", "hot 25% of each step", partial(_selected, top_k_frac=1.0), per_step=True),
    ]
    return {condition.name: condition for condition in listed}


def _selected(profile: RoutingProfile, seed: int, **options: Any) -> Mask:
    return select_experts(profile, seed=seed, **options).to_dict()


def _no_expert(profile: RoutingProfile, seed: int) -> Mask:
    return {layer: [] for layer in profile.counts}


def _hot_and_cold(profile: RoutingProfile, seed: int, share: float) -> Mask:
    """The hottest experts, and as many drawn from the colder half of their layer."""
    hot = select_experts(profile, top_k_frac=share)
    hotter_half = select_experts(profile, top_k_frac=0.5)
    mask = {}
    for layer, counts in profile.counts.items():
        cold = sorted(set(range(len(counts))) - set(hotter_half[layer]))
        fillers = random.Random(f"{seed}:{layer}:cold").sample(cold, min(len(hot[layer]), len(cold)))
        mask[layer] = sorted({*hot[layer], *fillers})
    return mask
