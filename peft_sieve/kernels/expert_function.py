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
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import replay
from .chunks import Chunk
from .delta import Delta, ProductBackward
from .dispatch import Dispatch
from .groups import Groups
from .stacks import ExpertStacks
from .token_sums import TokenSums
from .workers import for_each


@dataclass
class ExpertPlan:
    """How one forward of a layer is done.

    Attributes:
        chunks: in which pieces the pairs are handled.
        stacks_again: the frozen part once more, for the backward: what is stored in fewer bits, or offloaded, is made
            for each pass.
        first_adapters, down_adapters: what is added to each product.
        keep: whether a backward may follow.
    """

    chunks: Sequence[Chunk]
    stacks_again: Callable[[], AbstractContextManager[ExpertStacks]]
    first_adapters: Sequence[Delta] = field(default_factory=list)
    down_adapters: Sequence[Delta] = field(default_factory=list)
    keep: bool = True

    def __post_init__(self) -> None:
        self.first_groups = self._groups(self.first_adapters)
        self.down_groups = self._groups(self.down_adapters)

    def kept_per_chunk(self, stacks: ExpertStacks) -> int:
        """How many tensors the forward of a chunk leaves for its backward."""
        return 1 + len(self.first_adapters) + len(self.down_adapters) + (stacks.post_norm is not None)

    def _groups(self, adapters: Sequence[Delta]) -> list[list[tuple[Delta, Groups]]]:
        """For each chunk, the adapters and their ranges in it; made once, since ranges remember what they dropped."""
        return [
            [(adapter, chunk.groups.select(adapter.slots, adapter.ids)) for adapter in adapters]
            for chunk in self.chunks
        ]


class ExpertFunction(torch.autograd.Function):
    """`apply(plan, stacks, dispatch, hidden_states, expert_weights, *factors)`: (tokens, hidden) -> (tokens, hidden).

    `stacks` are the frozen part, for the forward only. If it goes one by one, the pairs of a token are summed in the
    order of their experts, not in that of the dispatch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: ExpertPlan,
        stacks: ExpertStacks,
        dispatch: Dispatch,
        hidden_states: Tensor,
        expert_weights: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        dtype = stacks.down.dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            factors_used = [factor.to(dtype) for factor in factors]
            weights = dispatch.sort(expert_weights)
            sum_dtype = hidden_states.dtype if stacks.one_by_one else torch.promote_types(dtype, weights.dtype)
            total = TokenSums(dispatch, hidden_states, sum_dtype, len(plan.chunks))
            kept: list[Tensor] = []
            for chunk, first, down in zip(plan.chunks, plan.first_groups, plan.down_groups, strict=True):
                rows = chunk.rows
                x = hidden_states.index_select(0, dispatch.tokens[rows]).to(dtype)  # (rows, hidden)
                up = _project(x, stacks.first, stacks.first_bias, chunk, dispatch)
                inners = [adapter.add(x, up, g, factors_used, adapter.last) for adapter, g in first]
                del x
                act = stacks.activation(up)  # (rows, intermediate)
                out = _project(act, [stacks.down], stacks.down_bias, chunk, dispatch)  # (rows, hidden)
                spare = act is not up
                inners += [adapter.add(act, out, g, factors_used, adapter.last and spare) for adapter, g in down]
                if plan.keep:
                    kept += [up, *inners] if stacks.post_norm is None else [up, *inners, out]
                normed = out if stacks.post_norm is None else stacks.post_norm(out)
                total.add(chunk, normed, weights[rows])
        if plan.keep:
            ctx.plan, ctx.num_factors, ctx.layout = plan, len(factors), (dispatch.top_k, dispatch.rank_major)
            # Tensors only here, where autograd lets go of them after the backward.
            ctx.save_for_backward(*dispatch.tensors(), hidden_states, expert_weights, *factors, *kept)
        return total.result().to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: ExpertPlan = ctx.plan
        order, tokens, expert_ids, counts, hidden_states, expert_weights, *saved = ctx.saved_tensors
        dispatch = Dispatch(order, tokens, expert_ids, counts, *ctx.layout)
        factors, kept = saved[: ctx.num_factors], saved[ctx.num_factors :]
        _, _, _, needs_hidden, needs_weights, *needs_factors = ctx.needs_input_grad
        # Made before any chunk, since those may come from several threads.
        with torch.autocast(hidden_states.device.type, enabled=False), plan.stacks_again() as stacks:
            dtype = stacks.down.dtype
            weights = dispatch.sort(expert_weights)
            # Added one after the other, half precision would round each time.
            sum_dtype = torch.promote_types(dtype, torch.float32) if stacks.one_by_one else dtype
            step = plan.kept_per_chunk(stacks)
            run = _Backward(
                plan=plan,
                stacks=stacks,
                dispatch=dispatch,
                hidden_states=hidden_states,
                weights=weights,
                kept=[kept[i : i + step] for i in range(0, len(kept), step)],
                factors=[factor.to(dtype) for factor in factors],
                grad=grads[0],
                grad_factors=[
                    torch.zeros_like(factor) if needed else None
                    for factor, needed in zip(factors, needs_factors, strict=True)
                ],
                grad_weights=torch.zeros_like(weights, dtype=torch.promote_types(weights.dtype, torch.float32)),
                grad_hidden=TokenSums(dispatch, hidden_states, sum_dtype, len(plan.chunks)) if needs_hidden else None,
            )
            sizes = [chunk.rows.stop - chunk.rows.start for chunk in plan.chunks]
            if stacks.one_by_one or hidden_states.device.type != "cpu":
                for index in range(len(sizes)):
                    run(index)
            else:
                for_each(run, sizes)
        return (
            None,
            None,
            None,
            run.grad_hidden.result(stock_bits=False).to(hidden_states.dtype) if run.grad_hidden is not None else None,
            dispatch.unsort(run.grad_weights).to(expert_weights.dtype) if needs_weights else None,
            *run.grad_factors,
        )


@dataclass
class _Backward:
    """The backward of one chunk after the other: each call writes the rows and factors of its own experts only.

    Attributes:
        weights: of the sorted pairs, (pairs,).
        kept: what the forward of each chunk left.
        factors: in the type of the stacks.
        grad: of the layer's output, (tokens, hidden).
        grad_factors, grad_weights, grad_hidden: written to; None where not wanted.
    """

    plan: ExpertPlan
    stacks: ExpertStacks
    dispatch: Dispatch
    hidden_states: Tensor
    weights: Tensor
    kept: Sequence[Sequence[Tensor]]
    factors: Sequence[Tensor]
    grad: Tensor
    grad_factors: Sequence[Tensor | None]
    grad_weights: Tensor
    grad_hidden: TokenSums | None

    def __call__(self, index: int) -> None:
        plan, dispatch, stacks = self.plan, self.dispatch, self.stacks
        dtype = stacks.down.dtype
        chunk, first, down = plan.chunks[index], plan.first_groups[index], plan.down_groups[index]
        rows, groups, tokens = chunk.rows, chunk.groups, dispatch.tokens[chunk.rows]
        up, *inners = self.kept[index]
        grad_out = self.grad.index_select(0, tokens)  # (rows, hidden)
        pair_weights = self.weights[rows].unsqueeze(-1)
        scale: Tensor | None = pair_weights
        if stacks.post_norm is not None:
            normed, grad_norm = replay(stacks.post_norm, inners.pop())
            self.grad_weights[rows] = _row_dot(grad_out, normed)
            grad_out, scale = grad_norm(grad_out * pair_weights), None
        grad_out = grad_out.to(dtype)
        act, grad_activation = stacks.replay_activation(up)
        # Not yet multiplied by the pair's weight: its product with act is the gradient of that weight.
        grad_act = groups.project(grad_out, stacks.down.transpose(1, 2))
        product = ProductBackward(grad_out, act, grad_act, self.factors, self.grad_factors, scale)
        _add_gradients(down, inners[len(first) :], product, consume=False)
        if scale is not None:
            self.grad_weights[rows] = _row_dot(grad_act, act)
            if stacks.down_bias is not None:
                bias = stacks.down_bias.index_select(0, dispatch.expert_ids[rows])
                self.grad_weights[rows] += _row_dot(grad_out, bias)
            grad_act.mul_(scale)
        grad_up = grad_activation(grad_act).contiguous()
        del grad_out, act, grad_act, product
        grad_x = _project_back(grad_up, stacks.first, groups)
        if any(not ranges.is_empty for _, ranges in first):
            x = self.hidden_states.index_select(0, tokens).to(dtype)
            product = ProductBackward(grad_up, x, grad_x, self.factors, self.grad_factors)
            _add_gradients(first, inners[: len(first)], product, consume=True)
        if self.grad_hidden is not None:
            self.grad_hidden.add(chunk, grad_x)
        for _, ranges in (*first, *down):
            ranges.forget()


def _project(x: Tensor, stacks: Sequence[Tensor], bias: Tensor | None, chunk: Chunk, dispatch: Dispatch) -> Tensor:
    """The products with all stacks side by side: (rows, in) -> (rows, sum of the stacks' outs)."""
    outs = [chunk.groups.project(x, stack) for stack in stacks]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    return out if bias is None else out.add_(bias.index_select(0, dispatch.expert_ids[chunk.rows]))


def _project_back(grad: Tensor, stacks: Sequence[Tensor], groups: Groups) -> Tensor:
    """The gradient of the input of `_project`: (rows, sum of the stacks' outs) -> (rows, in)."""
    parts = [grad] if len(stacks) == 1 else grad.split([stack.shape[2] for stack in stacks], dim=-1)
    total = groups.project(parts[0].contiguous(), stacks[0].transpose(1, 2))
    for part, stack in zip(parts[1:], stacks[1:], strict=True):
        total += groups.project(part.contiguous(), stack.transpose(1, 2))
    return total


def _add_gradients(
    adapters: Sequence[tuple[Delta, Groups]], inners: Sequence[Tensor], product: ProductBackward, consume: bool
) -> None:
    """The backward of what adapters added to one product, whose input the last of them may overwrite if `consume`."""
    for (adapter, ranges), inner in zip(adapters, inners, strict=True):
        adapter.add_gradients(product, inner, ranges, consume and adapter.last)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))
