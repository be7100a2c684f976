"""Stacks of experts that are those of one model of transformers, found by the name of their class.

By name, because nothing else tells what such a forward does with its stacks: a guess would train something else.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ...kernels.activation import Function, Replayer, replay
from ...kernels.stacks import ExpertStacks
from .family import PROJECTIONS, ExpertsCall, ExpertsShape, OnDispatch
from .fused import FusedExperts
from .gates import gate_by


def _class_name(module: nn.Module) -> str:
    """bitsandbytes' 4-bit stacks are parametrised, which puts a class of its own in front of the module's."""
    return type_before_parametrizations(module).__name__


class StackedExperts(FusedExperts):
    """Gated experts in stacks, without biases, whose own forward goes through one expert after the other."""

    # Name of the experts class.
    class_name: str
    dequantises = False

    def matches(self, module: nn.Module) -> bool:
        return _class_name(module) == self.class_name and bool(list(module.parameters()))

    @abstractmethod
    def first(self, experts: Any) -> list[torch.Tensor]:
        """Gate, then up, in one stack or in two: views of shape (num_experts, in, out)."""

    @abstractmethod
    def down(self, experts: Any) -> torch.Tensor:
        """A view of shape (num_experts, in, out)."""

    def activation(self, experts: Any) -> tuple[Function, Replayer]:
        """From gate and up side by side to the input of down, and how to replay it."""
        return gate_by(experts.act_fn)

    def shape(self, experts: nn.Module) -> ExpertsShape:
        stacks = {name: self._stack(experts, name) for name in PROJECTIONS}
        sizes = {name: (stack.shape[2], stack.shape[1]) for name, stack in stacks.items()}
        return ExpertsShape(stacks["down_proj"].shape[0], sizes)

    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        return sorted({"down_proj" if p == "down_proj" else "gate_up_proj" for p in projections})

    def stacks(self, experts: Any, dtype: torch.dtype) -> ExpertStacks:
        first = self.first(experts)
        width = sum(stack.shape[2] for stack in first) // 2
        activation, replay_activation = self.activation(experts)
        return ExpertStacks(
            first=first,
            down=self.down(experts),
            columns={"gate_proj": slice(width), "up_proj": slice(width, None), "down_proj": slice(None)},
            activation=activation,
            replay_activation=replay_activation,
            one_by_one=True,
        )

    def _stack(self, experts: Any, projection: str) -> torch.Tensor:
        if projection == "down_proj":
            return self.down(experts).transpose(1, 2)
        first = self.first(experts)
        gate, up = first if len(first) == 2 else first[0].chunk(2, dim=-1)
        return (gate if projection == "gate_proj" else up).transpose(1, 2)


class Step3p7(StackedExperts):
    """The common layout and call, with a gate of its own."""

    name = "step3p7"
    class_name = "Step3p7Experts"

    def matches(self, module: nn.Module) -> bool:
        return super().matches(module) and not hasattr(module, "has_gate")

    def first(self, experts: Any) -> list[torch.Tensor]:
        return [experts.gate_up_proj.detach().transpose(1, 2)]

    def down(self, experts: Any) -> torch.Tensor:
        return experts.down_proj.detach().transpose(1, 2)

    def activation(self, experts: Any) -> tuple[Function, Replayer]:
        return experts._apply_gate, partial(replay, experts._apply_gate)


class LongcatFlash(StackedExperts):
    """Some experts have no weights and return their input. Their ids come last, and they take no adapter.

    `gate_up_proj` has rows for them, `down_proj` has not.
    """

    name = "longcat_flash"
    class_name = "LongcatFlashExperts"
    reads_router_weight = True

    def first(self, experts: Any) -> list[torch.Tensor]:
        return [experts.gate_up_proj.detach()[: experts.down_proj.shape[0]].transpose(1, 2)]

    def down(self, experts: Any) -> torch.Tensor:
        return experts.down_proj.detach().transpose(1, 2)

    def stacks(self, experts: Any, dtype: torch.dtype) -> ExpertStacks:
        return replace(super().stacks(experts, dtype), passes_others=True)


class Llama4(StackedExperts):
    """Every expert gets a row for every token, scaled by the token's score for it, which is zero where it was not sent.

    A row of zeros comes out as zeros, so the experts with adapters leave those out.
    """

    name = "llama4"
    class_name = "Llama4TextExperts"

    def first(self, experts: Any) -> list[torch.Tensor]:
        return [experts.gate_up_proj.detach()]

    def down(self, experts: Any) -> torch.Tensor:
        return experts.down_proj.detach()

    def bind(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall:
        rows = args[0] if args else kwargs["hidden_states"]  # (num_experts * tokens, hidden)
        num_experts = experts.gate_up_proj.shape[0]
        ids = torch.arange(num_experts, device=rows.device).repeat_interleave(rows.shape[0] // num_experts)
        ids = ids.masked_fill(~rows.detach().any(-1), num_experts)
        return ExpertsCall(rows, ids.unsqueeze(-1), rows.new_ones(rows.shape[0], 1))

    def watch(self, experts: nn.Module, parent: Any, on_dispatch: OnDispatch) -> list[Any]:
        def hook(module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            scores, logits = output  # (tokens, num_experts), both
            expert_ids = torch.topk(logits, parent.top_k, dim=1).indices
            on_dispatch(expert_ids, scores.gather(1, expert_ids))

        return [parent.router.register_forward_hook(hook)]


class Dbrx(StackedExperts):
    """`mlp.w1`, `mlp.v1` and `mlp.w2` hold the experts one below the other, (num_experts * ffn, hidden) each."""

    name = "dbrx"
    class_name = "DbrxExperts"

    def first(self, experts: Any) -> list[torch.Tensor]:
        return [self._by_expert(experts, name).transpose(1, 2) for name in ("w1", "v1")]

    def down(self, experts: Any) -> torch.Tensor:
        return self._by_expert(experts, "w2")

    def activation(self, experts: Any) -> tuple[Function, Replayer]:
        return gate_by(experts.mlp.activation_fn)

    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        names = {"gate_proj": "mlp.w1", "up_proj": "mlp.v1", "down_proj": "mlp.w2"}
        return [names[projection] for projection in projections]

    def _by_expert(self, experts: Any, name: str) -> torch.Tensor:
        """(num_experts, ffn, hidden)"""
        weight: torch.Tensor = getattr(experts.mlp, name).detach()
        return weight.view(experts.num_experts, -1, weight.shape[1])


class Zaya(FusedExperts):
    """The common interface; but the router sends tokens that skip the layer to expert 0, with weight zero."""

    name = "zaya"

    def matches(self, module: nn.Module) -> bool:
        return _class_name(module) == "ZayaExperts" and super().matches(module)

    def watch(self, experts: Any, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        num_experts = self.shape(experts).num_experts

        def without_skipped(expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
            on_dispatch(expert_ids.masked_fill(expert_weights == 0, num_experts), expert_weights)

        return super().watch(experts, parent, without_skipped)


FAMILIES_BY_CLASS_NAME = (Step3p7(), LongcatFlash(), Llama4(), Dbrx(), Zaya())
