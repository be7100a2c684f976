"""Adapters on fused experts (3-D parameters), the common interface of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import SieveError
from ...moe.activation import activation_of
from ...moe.chunks import CHUNK_ROWS, device_chunks, device_groups_usable, loop_chunks
from ...moe.dispatch import sort_by_expert
from ...moe.dropout import Dropout
from ...moe.families import bind_dispatch
from ...moe.placement import onloaded
from ...moe.quantised import plain_stack
from .expert_function import ExpertFunction, ExpertPlan, Stacks
from .layer import INPUT_PROJECTIONS, SieveExpertLayer
from .low_rank import LowRank, Part


class FusedSieveExperts(SieveExpertLayer):
    """LoRA on some experts of a layer with the common interface of transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`experts(hidden_states, top_k_index, top_k_weights)`: (tokens, hidden) -> (tokens, hidden).

        Raises:
            SieveError: a parameter of the experts themselves requires a gradient.
        """
        adapters = self.applied_adapters()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        hidden_states, expert_ids, expert_weights = bind_dispatch(args, kwargs)
        return self._adapted_forward(hidden_states, expert_ids, expert_weights, adapters)

    @torch.compiler.disable(reason="adapted experts run outside the graph: leave fullgraph at False")
    def _adapted_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        adapters: list[str],
    ) -> torch.Tensor:
        experts: Any = self.get_base_layer()
        self._require_frozen(experts)
        factors: list[torch.Tensor] = []
        first_adapters, down_adapters = [], []
        for name in adapters:
            first_adapters += self._low_rank(name, "lora_gate_up", INPUT_PROJECTIONS, factors)
            down_adapters += self._low_rank(name, "lora_down", ("down_proj",), factors)
        for group in (first_adapters, down_adapters):
            group[-1:] = [replace(adapter, last=True) for adapter in group[-1:]]

        # The stock forwards differ in how they multiply and in which order they sum. Following the one in use makes an
        # adapter that adds zero change nothing, to the bit: for experts_implementation="eager", an expert at a time.
        eager = getattr(getattr(experts, "config", None), "_experts_implementation", None) == "eager"
        stacks_again = partial(self._stacks, _compute_dtype(hidden_states))
        with stacks_again() as stacks:
            # Where the stock forward's hook would bring them, if the layer is on another device.
            hidden_states, expert_ids, expert_weights = (
                tensor.to(stacks.first.device) for tensor in (hidden_states, expert_ids, expert_weights)
            )
            dispatch = sort_by_expert(expert_ids, self.shape.num_experts, rank_major=eager)
            if not eager and device_groups_usable([stacks.first, stacks.down]):
                chunks = device_chunks(dispatch.counts, dispatch.order.numel())
            else:
                chunks = loop_chunks(dispatch.counts, chunk_rows=1 if eager else CHUNK_ROWS)
            activation, replay_activation = activation_of(experts)
            plan = ExpertPlan(
                chunks=chunks,
                stacks_again=stacks_again,
                activation=activation,
                replay_activation=replay_activation,
                post_norm=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
                first_adapters=first_adapters,
                down_adapters=down_adapters,
                by_expert=eager,
                keep=torch.is_grad_enabled(),
            )
            result: torch.Tensor = ExpertFunction.apply(plan, stacks, dispatch, hidden_states, expert_weights, *factors)
        return result

    @contextmanager
    def _stacks(self, dtype: torch.dtype) -> Iterator[Stacks]:
        """The frozen weights as they are used, for one pass; those of a quantised layer in `dtype`."""
        experts: Any = self.get_base_layer()
        first_name = "gate_up_proj" if experts.has_gate else "up_proj"
        with onloaded(experts):
            first, down = (plain_stack(experts, name, dtype) for name in (first_name, "down_proj"))
            yield Stacks(
                first=first if experts.is_transposed else first.transpose(1, 2),
                down=down if experts.is_transposed else down.transpose(1, 2),
                first_bias=getattr(experts, f"{first_name}_bias").detach() if experts.has_bias else None,
                down_bias=experts.down_proj_bias.detach() if experts.has_bias else None,
            )

    def _low_rank(
        self, adapter_name: str, name: str, group: tuple[str, ...], factors: list[torch.Tensor]
    ) -> list[LowRank]:
        """One adapter's share in one product, its factors added to `factors`; none if it adapts no projection there."""
        if adapter_name not in getattr(self, f"{name}_A"):
            return []
        plan = self.plans[adapter_name]
        factors += [getattr(self, f"{name}_{side}")[adapter_name].weight for side in "AB"]
        parts, start = [], 0
        for projection in group:
            if projection in plan.ranks:
                ranks = slice(start, start + plan.ranks[projection])
                scaling = self.scaling[adapter_name] * plan.relative_scaling[projection]
                parts.append(Part(ranks, self._columns(projection), scaling))
                start = ranks.stop
        return [
            LowRank(
                slots={expert: slot for slot, expert in enumerate(plan.experts)},
                ids=self.slots_module(adapter_name).ids,
                parts=parts,
                dropout=_drawn(self.lora_dropout[adapter_name]),
                a=len(factors) - 2,
                b=len(factors) - 1,
            )
        ]

    def _columns(self, projection: str) -> slice:
        """Where the output of a projection lies in that of its stack."""
        experts: Any = self.get_base_layer()
        if not experts.has_gate or projection == "down_proj":
            return slice(None)
        second, width = projection == "up_proj", self.shape.intermediate_size
        if experts.is_concatenated:
            return slice(width, None) if second else slice(width)
        return slice(int(second), None, 2)

    def _require_frozen(self, experts: nn.Module) -> None:
        if not torch.is_grad_enabled():
            return
        trained = [name for name, parameter in experts.named_parameters() if parameter.requires_grad]
        if trained:
            raise SieveError(
                f"{', '.join(trained)} of {self.path} require gradients, expected the experts' own weights frozen, "
                "since only adapters are trained: call requires_grad_(False) on them"
            )


def _compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def _drawn(dropout: nn.Module) -> Dropout | None:
    """The mask of one forward. Its seed comes from the CPU's generator: no wait for the device, and checkpointing
    restores it."""
    if not isinstance(dropout, nn.Dropout) or not dropout.training or dropout.p == 0:
        return None
    return Dropout(dropout.p, int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")))
