"""The methods compared. All train the same adapters on attention, router and shared expert; they differ in the others.

Models of one setting share the frozen weights, so that all of them can be held, and run in turn, at once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from looped_experts import with_looped_experts
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from settings import Setting, build_base
from torch import nn
from transformers import PreTrainedModel

from peft_sieve import RoutingProfile, SieveLoraConfig, profile_routing, routing_statistics, select_experts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROUTER = "mlp.gate.weight"
SHARED_EXPERT = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class Bench:
    """One setting, ready to build methods on.

    Attributes:
        base: the frozen model; methods work on copies that share its tensors.
        batch: what it is trained on, and what the routing was profiled on.
        dropout: of all adapters that can have one (PEFT's on parameters cannot).
    """

    setting: Setting
    base: PreTrainedModel
    batch: dict[str, torch.Tensor]
    profile: RoutingProfile
    dropout: float

    @classmethod
    def of(cls, setting: Setting, dropout: float) -> Bench:
        base, batch = build_base(setting)
        return cls(setting, base, batch, profile_routing(base, [batch], progress=False), dropout)

    def copied_base(self) -> PreTrainedModel:
        tensors = itertools.chain(self.base.parameters(), self.base.buffers())
        return copy.deepcopy(self.base, {id(tensor): tensor for tensor in tensors})

    def mask(self, top_k_frac: float = 0.25, top_k: int | None = None) -> dict[str, list[int]]:
        """The hottest experts of each layer; the same for all methods that adapt a part."""
        return select_experts(self.profile, top_k_frac=top_k_frac, top_k=top_k).to_dict()

    def skew(self) -> dict[str, float]:
        """For a row: how skewed the routing is."""
        layers = routing_statistics(self.profile, top_k_frac=0.25).layers.values()
        return {
            "coverage_hot_quarter": round(sum(layer.coverage for layer in layers) / len(layers), 3),
            "cold_fraction": round(sum(layer.cold_fraction for layer in layers) / len(layers), 3),
        }

    def build(self, method: str, **options: Any) -> nn.Module:
        """The model of a method, in training mode.

        Args:
            options: of the method, such as `top_k` of the sieve's.
        """
        model = METHODS[method](self, **options)
        ours = always_active(model)
        assert ours == self.reference, f"{method} trains other adapters outside the routed experts than the floor"
        if self.setting.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    @cached_property
    def reference(self) -> dict[str, Any]:
        return always_active(floor(self))


def floor(bench: Bench) -> nn.Module:
    """No expert adapters; transformers' own forward of the experts."""
    return _plain_lora(bench, bench.copied_base(), [], [])


def sieve(bench: Bench, top_k_frac: float = 0.25, top_k: int | None = None, **options: Any) -> nn.Module:
    config = SieveLoraConfig(
        r=bench.setting.rank,
        lora_alpha=2 * bench.setting.rank,
        lora_dropout=bench.dropout,
        selected_experts=bench.mask(top_k_frac, top_k),
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(bench.copied_base(), config)


def shared(bench: Bench, top_k_frac: float, rank: int | None = None) -> nn.Module:
    """Outer factors of the layer, and one adapter for the cold experts.

    Args:
        rank: of the experts' adapters; None is the highest with no more parameters than the sieve's own.
    """
    setting = bench.setting
    wide, narrow = setting.hidden, setting.intermediate
    hot = max(1, round(top_k_frac * setting.experts))
    rank = rank or setting.rank * hot * (wide + narrow) // (wide + (hot + 1) * narrow)
    patterns = {"rank_pattern": {"mlp.experts": rank}, "alpha_pattern": {"mlp.experts": 2 * rank}}
    return sieve(bench, top_k_frac, cold_experts="shared", share_outer=True, **patterns)


def shared_at_rank(bench: Bench, top_k_frac: float) -> nn.Module:
    return shared(bench, top_k_frac, bench.setting.rank)


def peft_all(bench: Bench, experts_implementation: str) -> nn.Module:
    """PEFT's own adapters on the stacks; gate and up share one A there, so it has fewer parameters at a rank."""
    model = bench.copied_base()
    model.set_experts_implementation(experts_implementation)
    return _plain_lora(bench, model, [], EXPERTS)


def module_list(bench: Bench, top_k_frac: float) -> nn.Module:
    """The paper's own way: each expert a module of its own, adapted by plain LoRA."""
    # Paths, not one pattern: for models of this type PEFT replaces a pattern by the last names of what it matches.
    adapted = [
        f"{path}.{expert}.{name}"
        for path, experts in bench.mask(top_k_frac).items()
        for expert in experts
        for name in ("w_gate", "w_up", "w_down")
    ]
    return _plain_lora(bench, with_looped_experts(bench.copied_base()), adapted, [])


METHODS: dict[str, Callable[..., nn.Module]] = {
    "floor": floor,
    "sieve_25": partial(sieve, top_k_frac=0.25),
    "sieve_all": partial(sieve, top_k_frac=1.0),
    "shared_25": partial(shared, top_k_frac=0.25),
    "shared_25_same_rank": partial(shared_at_rank, top_k_frac=0.25),
    "cold_shared_25": partial(sieve, top_k_frac=0.25, cold_experts="shared"),
    "outer_shared_25": partial(sieve, top_k_frac=0.25, share_outer=True),
    "peft_all_grouped": partial(peft_all, experts_implementation="grouped_mm"),
    "peft_all_eager": partial(peft_all, experts_implementation="eager"),
    "module_list_25": partial(module_list, top_k_frac=0.25),
    "module_list_all": partial(module_list, top_k_frac=1.0),
}


def always_active(model: nn.Module) -> dict[str, Any]:
    """What is trained outside the experts: parameter -> shape, and adapted linear layer -> dropout."""
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad and not is_expert(n)}
    dropouts = {
        name: getattr(module.lora_dropout["default"], "p", 0.0)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear) and not is_expert(name)
    }
    return {**parameters, **dropouts}


def is_expert(name: str) -> bool:
    return ".experts." in name


def trainable_counts(model: nn.Module) -> dict[str, int]:
    """For a row: parameters trained, and those of them that belong to experts."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {
        "trainable": sum(sizes.values()),
        "trainable_experts": sum(size for name, size in sizes.items() if is_expert(name)),
    }


def _plain_lora(bench: Bench, model: nn.Module, modules: list[str], parameters: list[str]) -> nn.Module:
    config = LoraConfig(
        r=bench.setting.rank,
        lora_alpha=2 * bench.setting.rank,
        lora_dropout=0.0,  # a parameter's adapter, which the router's is, refuses any
        target_modules=[*ATTENTION, *(SHARED_EXPERT if bench.setting.shared else []), *modules],
        target_parameters=[*parameters, ROUTER],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, LoraLinear) and bench.dropout:
            module.lora_dropout["default"] = nn.Dropout(bench.dropout)
    return model
