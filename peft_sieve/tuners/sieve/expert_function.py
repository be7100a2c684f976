"""The forward and backward of one layer of experts with adapters on some of them, as one `autograd.Function`.

What autograd would do with the separate steps, it does with less: the frozen stacks have no gradient, nothing of the
size (pairs, hidden) is kept, the activation is computed again instead of stored, and the adapters' share is added in
place. Per pair, the width between the projections and the adapters' ranks are kept.

In the notation below, a pair is a token sent to one of its experts, and pairs are sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...moe.activation import Replay, replay
from ...moe.chunks import Chunk
from ...moe.dispatch import Dispatch
from ...moe.grouped import Groups
from ...moe.scratch import scratch
from .low_rank import LowRank


@dataclass(frozen=True)
class Stacks:
    """The frozen weights of a layer.

    Attributes:
        first, down: as (num_experts, in, out).
        first_bias, down_bias: (num_experts, out), None for none.
    """

    first: torch.Tensor
    down: torch.Tensor
    first_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@dataclass
class ExpertPlan:
    """How one forward of a layer is done.

    Attributes:
        chunks: in which pieces the pairs are handled.
        stacks_again: the frozen weights once more, for the backward: those of a quantised or offloaded layer are made
            for each pass.
        activation: between the products: (rows, first's width) -> (rows, down's input width).
        replay_activation: the activation again, with the map from its gradient to that of its input.
        post_norm: after the second product, None for none.
        first_adapters, down_adapters: what is added to each product.
        by_expert: sum the pairs of a token in the order of their experts, not in that of the dispatch.
        keep: whether a backward may follow.
    """

    chunks: Sequence[Chunk]
    stacks_again: Callable[[], AbstractContextManager[Stacks]]
    activation: Callable[[torch.Tensor], torch.Tensor]
    replay_activation: Callable[[torch.Tensor], Replay]
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None
    first_adapters: Sequence[LowRank] = field(default_factory=list)
    down_adapters: Sequence[LowRank] = field(default_factory=list)
    by_expert: bool = False
    keep: bool = True

    def __post_init__(self) -> None:
        self.first_groups = self._groups(self.first_adapters)
        self.down_groups = self._groups(self.down_adapters)

    def _groups(self, adapters: Sequence[LowRank]) -> list[list[tuple[LowRank, Groups]]]:
        """For each chunk, the adapters and their ranges in it; made once, since ranges remember what they dropped."""
        return [
            [(adapter, chunk.groups.select(adapter.slots, adapter.ids)) for adapter in adapters]
            for chunk in self.chunks
        ]


class ExpertFunction(torch.autograd.Function):
    """`apply(plan, stacks, dispatch, hidden_states, expert_weights, *factors)`: (tokens, hidden) -> (tokens, hidden).

    `stacks` is for the forward only."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: ExpertPlan,
        stacks: Stacks,
        dispatch: Dispatch,
        hidden_states: torch.Tensor,
        expert_weights: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        dtype = stacks.first.dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            factors_used = [factor.to(dtype) for factor in factors]
            weights = _sorted_weights(expert_weights, dispatch, plan.by_expert)
            total = _Total(dispatch, hidden_states, plan.by_expert)
            kept: list[torch.Tensor] = []
            for chunk, first, down in zip(plan.chunks, plan.first_groups, plan.down_groups, strict=True):
                rows = chunk.rows
                x = hidden_states.index_select(0, dispatch.tokens[rows]).to(dtype)  # (rows, hidden)
                up = _project(x, stacks.first, stacks.first_bias, chunk, dispatch)
                inners = [adapter.add(x, up, g, factors_used, adapter.last) for adapter, g in first]
                del x
                act = plan.activation(up)  # (rows, intermediate)
                out = _project(act, stacks.down, stacks.down_bias, chunk, dispatch)  # (rows, hidden)
                spare = act is not up
                inners += [adapter.add(act, out, g, factors_used, adapter.last and spare) for adapter, g in down]
                if plan.keep:
                    kept += [up, *inners] if plan.post_norm is None else [up, *inners, out]
                normed = out if plan.post_norm is None else plan.post_norm(out)
                total.add(chunk, normed, weights[rows])
        if plan.keep:
            ctx.plan, ctx.num_factors = plan, len(factors)
            # Tensors only here, where autograd lets go of them after the backward.
            ctx.save_for_backward(*dispatch.tensors(), hidden_states, expert_weights, *factors, *kept)
        return total.result().to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: ExpertPlan = ctx.plan
        order, tokens, expert_ids, counts, hidden_states, expert_weights, *saved = ctx.saved_tensors
        dispatch = Dispatch(order, tokens, expert_ids, counts, expert_weights.shape[1])
        factors, kept = saved[: ctx.num_factors], iter(saved[ctx.num_factors :])
        _, _, _, needs_hidden, needs_weights, *needs_factors = ctx.needs_input_grad
        with torch.autocast(hidden_states.device.type, enabled=False), plan.stacks_again() as stacks:
            dtype = stacks.first.dtype
            factors_used = [factor.to(dtype) for factor in factors]
            gradients = [
                torch.zeros_like(factor) if needed else None
                for factor, needed in zip(factors, needs_factors, strict=True)
            ]
            weights = _sorted_weights(expert_weights, dispatch, plan.by_expert)
            grad_weights = torch.empty_like(weights, dtype=torch.promote_types(weights.dtype, torch.float32))
            grad_hidden = _Total(dispatch, hidden_states, plan.by_expert, backward=True)
            for chunk, first, down in zip(plan.chunks, plan.first_groups, plan.down_groups, strict=True):
                rows, groups = chunk.rows, chunk.groups
                chunk_tokens = tokens[rows]
                up, *inners = (next(kept) for _ in range(1 + len(first) + len(down)))
                first_inners, down_inners = inners[: len(first)], inners[len(first) :]
                grad_out = grads[0].index_select(0, chunk_tokens)  # (rows, hidden)
                pair_weights = weights[rows].unsqueeze(-1)
                scale: torch.Tensor | None = pair_weights
                if plan.post_norm is not None:
                    normed, grad_norm = replay(plan.post_norm, next(kept))
                    grad_weights[rows] = _row_dot(grad_out, normed)
                    grad_out, scale = grad_norm(grad_out * pair_weights), None
                grad_out = grad_out.to(dtype)
                act, grad_activation = plan.replay_activation(up)
                # Not yet multiplied by the pair's weight: its product with act is the gradient of that weight.
                grad_act = groups.project(grad_out, stacks.down.transpose(1, 2))
                for (adapter, ranges), inner in zip(down, down_inners, strict=True):
                    adapter.add_gradients(grad_out, act, inner, scale, grad_act, ranges, factors_used, gradients, False)
                if scale is not None:
                    grad_weights[rows] = _row_dot(grad_act, act)
                    if stacks.down_bias is not None:
                        bias = stacks.down_bias.index_select(0, dispatch.expert_ids[rows])
                        grad_weights[rows] += _row_dot(grad_out, bias)
                    grad_act.mul_(scale)
                grad_up = grad_activation(grad_act).contiguous()
                del grad_out, act, grad_act
                grad_x = groups.project(grad_up, stacks.first.transpose(1, 2))
                if any(not ranges.is_empty for _, ranges in first):
                    x = hidden_states.index_select(0, chunk_tokens).to(dtype)
                    for (adapter, ranges), inner in zip(first, first_inners, strict=True):
                        adapter.add_gradients(
                            grad_up, x, inner, None, grad_x, ranges, factors_used, gradients, adapter.last
                        )
                if needs_hidden:
                    grad_hidden.add(chunk, grad_x)
                for _, ranges in (*first, *down):
                    ranges.forget()
        return (
            None,
            None,
            None,
            grad_hidden.result().to(hidden_states.dtype) if needs_hidden else None,
            _unsorted_weights(grad_weights, expert_weights, dispatch, plan.by_expert) if needs_weights else None,
            *gradients,
        )


class _Total:
    """Sums the pairs of each token, chunk after chunk: (rows, hidden) ... -> (tokens, hidden)."""

    def __init__(
        self, dispatch: Dispatch, hidden_states: torch.Tensor, by_expert: bool, backward: bool = False
    ) -> None:
        self.dispatch = dispatch
        # The order of a gradient's additions is nobody's promise, so the cheapest is taken; but on a GPU, adding to
        # rows that appear twice is not deterministic.
        self.added = by_expert or (backward and hidden_states.device.type == "cpu")
        num_tokens, width = hidden_states.shape
        self.shape = (num_tokens if self.added else dispatch.order.numel(), width)
        self.rows = hidden_states.new_zeros(self.shape) if self.added else hidden_states.new_empty((0, width))
        if backward and self.added:
            self.rows = self.rows.to(torch.promote_types(self.rows.dtype, torch.float32))

    def add(self, chunk: Chunk, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take the rows of one chunk, (rows, hidden), times their weights, (rows,)."""
        if self.added:
            rows = rows if weights is None else rows * weights.unsqueeze(-1)
            self.rows.index_add_(0, self.dispatch.tokens[chunk.rows], rows.to(self.rows.dtype))
            return
        if weights is None and len(rows) == self.shape[0]:
            self.rows = rows  # all at once, as on a GPU
            return
        if len(self.rows) != self.shape[0]:
            dtype = rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)
            self.rows = scratch(self.shape, dtype, rows.device)
        target = self.rows[chunk.rows]
        if weights is None:
            target.copy_(rows)
        else:
            torch.mul(rows, weights.unsqueeze(-1), out=target)

    def result(self) -> torch.Tensor:
        return self.rows if self.added else self.dispatch.sum_by_token(self.rows)


def _project(
    x: torch.Tensor, stack: torch.Tensor, bias: torch.Tensor | None, chunk: Chunk, dispatch: Dispatch
) -> torch.Tensor:
    out = chunk.groups.project(x, stack)
    return out if bias is None else out.add_(bias.index_select(0, dispatch.expert_ids[chunk.rows]))


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))


def _sorted_weights(expert_weights: torch.Tensor, dispatch: Dispatch, rank_major: bool) -> torch.Tensor:
    """(tokens, top_k) -> (pairs,)."""
    flat = (expert_weights.T if rank_major else expert_weights).reshape(-1)
    return flat.index_select(0, dispatch.order)


def _unsorted_weights(
    values: torch.Tensor, expert_weights: torch.Tensor, dispatch: Dispatch, rank_major: bool
) -> torch.Tensor:
    flat = dispatch.unsort(values)
    tokens, top_k = expert_weights.shape
    return (flat.view(top_k, tokens).T if rank_major else flat.view(tokens, top_k)).to(expert_weights.dtype)
