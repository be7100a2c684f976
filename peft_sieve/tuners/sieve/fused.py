"""Adapters on fused experts (3-D parameters), without a loop over experts.

Tokens are sorted by expert, and each projection is one grouped product over the frozen stack. The rows of adapted
experts are then taken out, sent through two grouped products with the packed factors, and added back: the stack itself
is never changed, copied or differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...moe.families import bind_dispatch
from ...moe.grouped import ALIGNMENT_BYTES, grouped_mm, is_aligned_width
from .layer import INPUT_PROJECTIONS, SieveExpertLayer


@dataclass(frozen=True)
class Dispatch:
    """Token-expert pairs sorted by expert.

    Attributes:
        order: position of each sorted pair in the unsorted, flattened dispatch, (pairs,).
        tokens: token of each pair, (pairs,).
        expert_ids: expert of each pair, ascending, (pairs,).
        counts: pairs per expert, (num_experts,).
    """

    order: torch.Tensor
    tokens: torch.Tensor
    expert_ids: torch.Tensor
    counts: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        """End of each expert's rows, int32, (num_experts,)."""
        return self.counts.cumsum(0, dtype=torch.int32)


class FusedSieveExperts(SieveExpertLayer):
    """LoRA on some experts of a layer with the common interface of transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`experts(hidden_states, top_k_index, top_k_weights)`: (tokens, hidden) -> (tokens, hidden)."""
        adapters = self.applied_adapters()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        hidden_states, expert_ids, expert_weights = bind_dispatch(args, kwargs)
        return self._adapted_forward(hidden_states, expert_ids, expert_weights, adapters)

    def _adapted_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        adapters: list[str],
    ) -> torch.Tensor:
        experts: Any = self.get_base_layer()
        # The stock forwards differ in how they multiply and in which order they sum. Following the one in use makes an
        # adapter that adds zero change nothing, to the bit: for experts_implementation="eager", an expert at a time.
        eager = getattr(getattr(experts, "config", None), "_experts_implementation", None) == "eager"
        dispatch = _sort_by_expert(expert_ids, self.shape.num_experts, rank_major=eager)
        rows = {name: self._hot_rows(name, dispatch) for name in adapters}

        x = hidden_states[dispatch.tokens]  # (pairs, hidden)
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        up = _project(experts, first, x, dispatch, eager)  # (pairs, 2 * intermediate) or (pairs, intermediate)
        for name in adapters:
            up = self._add_input_delta(name, up, x, rows[name])
        activation = experts._apply_gate if experts.has_gate else experts.act_fn
        # (pairs, intermediate); vectorised functions round the end of a tensor differently, so eager goes by expert
        act = torch.cat([activation(part) for part in up.split(dispatch.counts.tolist())]) if eager else activation(up)
        out = _project(experts, "down_proj", act, dispatch, eager)  # (pairs, hidden)
        for name in adapters:
            out = self._add_down_delta(name, out, act, rows[name])
        if getattr(experts, "has_post_expert_norm", False):
            out = experts.post_expert_norm(out)
        flat_weights = (expert_weights.T if eager else expert_weights).reshape(-1)
        weighted = out * flat_weights[dispatch.order].unsqueeze(-1)
        return _combine(weighted, dispatch, hidden_states, expert_ids.shape[-1], eager)

    def _hot_rows(self, adapter_name: str, dispatch: Dispatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The rows of adapted experts (None: all of them) and the end of each slot's share of them."""
        mapping = self.slots_module(adapter_name)
        offsets = dispatch.counts[mapping.ids].cumsum(0, dtype=torch.int32)
        if mapping.ids.numel() == self.shape.num_experts:
            return None, offsets
        # Rows are sorted by expert and slots ascend with the expert, so the rows found are sorted by slot.
        rows = (mapping.slots[dispatch.expert_ids] >= 0).nonzero().squeeze(-1)
        return rows, offsets

    def _add_input_delta(
        self, adapter_name: str, up: torch.Tensor, x: torch.Tensor, hot: tuple[torch.Tensor | None, torch.Tensor]
    ) -> torch.Tensor:
        if adapter_name not in self.lora_gate_up_A:
            return up
        deltas = self._low_rank(adapter_name, "lora_gate_up", INPUT_PROJECTIONS, x, hot)
        experts: Any = self.get_base_layer()
        if not experts.has_gate:
            return _add_rows(up, deltas["up_proj"], hot[0])
        known = next(iter(deltas.values()))
        gate, second = (deltas.get(name, torch.zeros_like(known)) for name in INPUT_PROJECTIONS)
        # (hot rows, 2 * intermediate), laid out as the stack lays out its output
        both = torch.cat((gate, second), -1) if experts.is_concatenated else torch.stack((gate, second), -1).flatten(-2)
        return _add_rows(up, both, hot[0])

    def _add_down_delta(
        self, adapter_name: str, out: torch.Tensor, act: torch.Tensor, hot: tuple[torch.Tensor | None, torch.Tensor]
    ) -> torch.Tensor:
        if adapter_name not in self.lora_down_A:
            return out
        deltas = self._low_rank(adapter_name, "lora_down", ("down_proj",), act, hot)
        return _add_rows(out, deltas["down_proj"], hot[0])

    def _low_rank(
        self,
        adapter_name: str,
        factors: str,
        group: tuple[str, ...],
        x: torch.Tensor,
        hot: tuple[torch.Tensor | None, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """What the adapter adds to each projection of `group`: name -> (hot rows, out)."""
        rows, offsets = hot
        plan = self.plans[adapter_name]
        names = [name for name in group if name in plan.ranks]
        # The product of the frozen stack is in the stack's type, also under autocast: follow it.
        dtype = next(self.get_base_layer().parameters()).dtype
        a = getattr(self, f"{factors}_A")[adapter_name].weight.to(dtype)  # (slots, rank, in)
        b = getattr(self, f"{factors}_B")[adapter_name].weight.to(dtype)  # (slots, rank, out)
        ranks = [plan.ranks[name] for name in names]
        a, b, ranks = _aligned_ranks(a, b, ranks)
        x = self.lora_dropout[adapter_name](x if rows is None else x[rows]).to(dtype)  # (hot rows, in)
        inner = grouped_mm(x, a.transpose(1, 2), offsets)  # (hot rows, rank)
        deltas = {}
        for name, part, b_part in zip(names, inner.split(ranks, -1), b.split(ranks, 1), strict=True):
            scaling = self.scaling[adapter_name] * plan.relative_scaling[name]
            deltas[name] = grouped_mm(part * scaling, b_part, offsets)
        return deltas


def _sort_by_expert(expert_ids: torch.Tensor, num_experts: int, rank_major: bool) -> Dispatch:
    """Sort the pairs of a dispatch (tokens, top_k) by expert; `rank_major` flattens it as (top_k, tokens)."""
    num_tokens, top_k = expert_ids.shape
    flat = (expert_ids.T if rank_major else expert_ids).reshape(-1)
    # Stable only where an order within an expert is to be met; otherwise the same call as the stock forward.
    sorted_ids, order = torch.sort(flat, stable=rank_major)
    tokens = order % num_tokens if rank_major else order // top_k
    # histc, not bincount: no copy to the host. It takes no integers on the CPU.
    values = sorted_ids.int() if sorted_ids.is_cuda else sorted_ids.float()
    counts = torch.histc(values, bins=num_experts, min=0, max=num_experts - 1).to(torch.int64)
    return Dispatch(order, tokens, sorted_ids, counts)


def _project(experts: Any, name: str, x: torch.Tensor, dispatch: Dispatch, loop: bool) -> torch.Tensor:
    """One projection of every pair through the frozen stack."""
    weight = getattr(experts, name)
    matrices = weight if experts.is_transposed else weight.transpose(1, 2)  # (num_experts, in, out)
    out = grouped_mm(x.to(weight.dtype), matrices, dispatch.offsets, loop=loop)
    if experts.has_bias:
        out = out + getattr(experts, f"{name}_bias")[dispatch.expert_ids]
    return out


def _combine(
    weighted: torch.Tensor, dispatch: Dispatch, hidden_states: torch.Tensor, top_k: int, eager: bool
) -> torch.Tensor:
    """Sum the pairs of each token: (pairs, hidden) -> (tokens, hidden)."""
    if eager:
        total = torch.zeros_like(hidden_states)
        return total.index_add_(0, dispatch.tokens, weighted.to(total.dtype))
    inverse = torch.empty_like(dispatch.order)
    inverse[dispatch.order] = torch.arange(inverse.numel(), device=inverse.device)
    return weighted[inverse].view(-1, top_k, weighted.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _add_rows(target: torch.Tensor, delta: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    delta = delta.to(target.dtype)
    return target + delta if rows is None else target.index_add_(0, rows, delta)


def _aligned_ranks(a: torch.Tensor, b: torch.Tensor, ranks: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Pad each rank with zeros to what the grouped kernel takes; no copy when all fit already."""
    if all(is_aligned_width(rank, a.dtype) for rank in ranks):
        return a, b, ranks
    unit = ALIGNMENT_BYTES // a.dtype.itemsize
    padded = [-(-rank // unit) * unit for rank in ranks]
    parts = [
        [
            F.pad(part, (0, 0, 0, after - rank))
            for part, rank, after in zip(w.split(ranks, 1), ranks, padded, strict=True)
        ]
        for w in (a, b)
    ]
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1), padded
