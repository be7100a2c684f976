"""Experts that share factors, at the trainable parameters of the hot quarter.

Attention, router and shared experts keep the study's rank in every condition. What the experts of the hot quarter have
at that rank is the budget of all other conditions; each has the highest rank, or the most experts, within it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from peft_sieve import RoutingProfile, select_experts
from peft_sieve.moe.families.family import ExpertsShape
from peft_sieve.moe.topology import find_moe_layers

from .conditions import Mask
from .run import LoadedTask
from .settings import Settings
from .training import adapted, base_model, lora_config, scores, train

# The others write the layer's output. These sides are the outer ones, the other side of each is inside the expert.
_READS_INPUT = ("gate_proj", "up_proj")
ADDED = "added"


@dataclass(frozen=True)
class Sharing:
    """One way to spend the parameters.

    Attributes:
        name: in the rows.
        label: in tables and figures.
        own: share of a layer's experts that have factors of their own, the hottest. None is as many as fit within the
            budget at the study's rank.
        cold: what the other experts get: "frozen" (nothing), "shared" (one adapter that they use together), or
            "added" (one adapter that all experts use, the hottest in addition to their own).
        share_outer: whether the outer factors are one per layer.
        budgeted: whether its rank is the highest within the budget; otherwise it is the study's.
    """

    name: str
    label: str
    own: float | None
    cold: str = "frozen"
    share_outer: bool = False
    budgeted: bool = True


CONDITIONS = {
    condition.name: condition
    for condition in (
        Sharing("all", "all experts (full LoRA)", 1.0, budgeted=False),
        Sharing("hot_25", "hot 25% (the recipe)", 0.25),
        Sharing("none", "no expert", 0.0, budgeted=False),
        Sharing("hot_25_both", "hot 25% + cold shared, outer shared", 0.25, "shared", True),
        Sharing("hot_less_added", "hot 25% less one + one that all add", None, ADDED),
        Sharing("hot_less_shared", "hot 25% less one + cold shared", None, "shared"),
        Sharing("hot_12_both", "hot 12.5% + cold shared, outer shared", 0.125, "shared", True),
        Sharing("hot_50_both", "hot 50% + cold shared, outer shared", 0.5, "shared", True),
        Sharing("hot_25_outer", "hot 25%, outer shared", 0.25, share_outer=True),
        Sharing("all_outer", "all experts, outer shared", 1.0, share_outer=True),
        Sharing("one", "one adapter for all experts", 0.0, "shared"),
    )
}


@dataclass(frozen=True)
class Sizes:
    """What a condition comes to on a model.

    Attributes:
        own: experts of each layer with factors of their own.
        rank: of the experts' adapters.
        parameters: trainable ones, of the experts' adapters.
    """

    own: int
    rank: int
    parameters: int


def sizes(condition: Sharing, layers: Sequence[ExpertsShape], settings: Settings) -> Sizes:
    """Number of experts and rank of a condition.

    Args:
        layers: shape of each layer's experts, equally many in each.
    """
    num_experts = layers[0].num_experts
    budget = sum(_parameters(layer, count(settings.hot, num_experts), False, False, settings.r) for layer in layers)

    def spent(own: int, rank: int) -> int:
        # The adapter that all experts add is one more set of factors, as one for the rest is.
        more = condition.cold != "frozen" and (own < num_experts or condition.cold == ADDED)
        return sum(_parameters(layer, own, more, condition.share_outer, rank) for layer in layers)

    if condition.own is None:
        own = max(n for n in range(1, num_experts + 1) if spent(n, settings.r) <= budget)
    else:
        own = count(condition.own, num_experts)
    at_rank_1 = spent(own, 1)
    rank = budget // at_rank_1 if condition.budgeted else settings.r
    return Sizes(own, rank, at_rank_1 * rank)


def count(share: float, num_experts: int) -> int:
    """A share of the experts as a number, rounded as `top_k_frac` is."""
    return max(1, round(share * num_experts)) if share else 0


def _parameters(layer: ExpertsShape, own: int, one_more: bool, share_outer: bool, rank: int) -> int:
    """Of the factors of `own` experts, and of one more set that experts have together."""
    slots, total = own + one_more, 0
    for name, (in_features, out_features) in layer.projections.items():
        outer, inner = (in_features, out_features) if name in _READS_INPUT else (out_features, in_features)
        total += rank * (inner * slots + outer * (bool(slots) if share_outer else slots))
    return total


def with_sharing(condition: Sharing, profile: RoutingProfile, seed: int, settings: Settings) -> tuple[PeftModel, Sizes]:
    """The model with a condition's adapters, ready to train, and how large they are."""
    shapes = [layer.shape for layer in find_moe_layers(base_model(settings))]
    size = sizes(condition, shapes, settings)
    mask = select_experts(profile, top_k=size.own).to_dict() if size.own else {layer: [] for layer in profile.counts}
    scaling = settings.lora_alpha / settings.r
    options: dict[str, Any] = {
        "rank_pattern": {"experts": size.rank},
        "alpha_pattern": {"experts": scaling * size.rank},
        "share_outer": condition.share_outer,
    }
    if condition.cold == "shared":
        options["cold_experts"] = "shared"
    model = adapted(mask, seed, settings, **options)
    if condition.cold == ADDED:
        add_for_all(model, mask, settings)
    return model, size


def add_for_all(model: PeftModel, mask: Mask, settings: Settings) -> None:
    """A second adapter, on experts only, that all experts of a layer use; both are active and train."""
    nowhere_else = dict.fromkeys(("train_attention", "train_router", "train_shared_experts"), False)
    nothing_own: Mask = {layer: [] for layer in mask}
    model.add_adapter(ADDED, lora_config(settings, nothing_own, cold_experts="shared", **nowhere_else))
    model.base_model.set_adapter(["default", ADDED])


def run_sharing(condition: Sharing, learning_rate: float, at: LoadedTask, seed: int) -> dict[str, Any]:
    """Train and evaluate; the seed gives the adapters' first values and the order of the rows."""
    start = time.perf_counter()
    settings = dataclasses.replace(at.settings, learning_rate=learning_rate)
    model, size = with_sharing(condition, at.profile, seed, settings)
    train(model, at.data, seed, at.tokenizer, settings)
    found = scores(model, at.data, at.tokenizer)
    if found["trainable_experts"] != size.parameters:
        raise AssertionError(f"{condition.name} trains {found['trainable_experts']} parameters, not {size.parameters}")
    return {
        **found,
        "own_experts": size.own,
        "rank": size.rank,
        "learning_rate": learning_rate,
        "seconds": round(time.perf_counter() - start, 1),
    }
