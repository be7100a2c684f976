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
from .delta import Delta, Layer, Product, ProductBackward
from .dispatch import Dispatch
from .groups import Groups
from .stacks import ExpertStacks
from .token_sums import TokenSums
from .workers import InOrder, for_each, largest_first


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
        return [[(adapter, chunk.groups.select(adapter.slots)) for adapter in adapters] for chunk in self.chunks]

    @property
    def adapters(self) -> list[Delta]:
        return [*self.first_adapters, *self.down_adapters]


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
            layer = Layer(dispatch, hidden_states.to(dtype), weights, factors_used)
            held = [adapter.begin(layer) for adapter in plan.adapters]
            held_first, held_down = held[: len(plan.first_adapters)], held[len(plan.first_adapters) :]
            kept: list[Tensor] = []
            for chunk, first, down in zip(plan.chunks, plan.first_groups, plan.down_groups, strict=True):
                rows, tokens = chunk.rows, dispatch.tokens[chunk.rows]
                x = layer.hidden_states.index_select(0, tokens)  # (rows, hidden)
                up = _project(x, stacks.first, stacks.first_bias, chunk, dispatch)
                inners = _add(first, held_first, Product(x, up, rows, tokens, factors_used), consume=True)
                del x
                act = stacks.activation(up)  # (rows, intermediate)
                out = _project(act, [stacks.down], stacks.down_bias, chunk, dispatch)  # (rows, hidden)
                spare = act is not up
                inners += _add(down, held_down, Product(act, out, rows, tokens, factors_used), consume=spare)
                if plan.keep:
                    kept += [up, *inners] if stacks.post_norm is None else [up, *inners, out]
                normed = out if stacks.post_norm is None else stacks.post_norm(out)
                total.add(chunk, normed, weights[rows])
            result = total.result()
            for adapter, own in zip(plan.adapters, held, strict=True):
                adapter.end(layer, own, result)
        if plan.keep:
            ctx.plan, ctx.num_factors, ctx.layout = plan, len(factors), (dispatch.top_k, dispatch.rank_major)
            # Tensors only here, where autograd lets go of them after the backward.
            ctx.save_for_backward(*dispatch.tensors(), hidden_states, expert_weights, *factors, *held, *kept)
        return result.to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: ExpertPlan = ctx.plan
        order, tokens, expert_ids, counts, hidden_states, expert_weights, *saved = ctx.saved_tensors
        dispatch = Dispatch(order, tokens, expert_ids, counts, *ctx.layout)
        factors, saved = saved[: ctx.num_factors], saved[ctx.num_factors :]
        held, kept = saved[: len(plan.adapters)], saved[len(plan.adapters) :]
        _, _, _, needs_hidden, needs_weights, *needs_factors = ctx.needs_input_grad
        # Made before any chunk, since those may come from several threads.
        with torch.autocast(hidden_states.device.type, enabled=False), plan.stacks_again() as stacks:
            dtype = stacks.down.dtype
            weights = dispatch.sort(expert_weights)
            # Added one after the other, half precision would round each time.
            sum_dtype = torch.promote_types(dtype, torch.float32) if stacks.one_by_one else dtype
            step = plan.kept_per_chunk(stacks)
            gradients = _zeros_for(factors, needs_factors, plan.adapters)
            layer = Layer(dispatch, hidden_states.to(dtype), weights, [f.to(dtype) for f in factors], gradients)
            grad = grads[0]
            sizes = [chunk.rows.stop - chunk.rows.start for chunk in plan.chunks]
            in_threads = not stacks.one_by_one and hidden_states.device.type == "cpu"
            run = _Backward(
                plan=plan,
                stacks=stacks,
                layer=layer,
                kept=[kept[i : i + step] for i in range(0, len(kept), step)],
                held=held,
                made=[a.begin_gradients(layer, h, grad.to(dtype)) for a, h in zip(plan.adapters, held, strict=True)],
                grad=grad,
                late=InOrder(largest_first(sizes) if in_threads else range(len(sizes))),
                grad_weights=torch.zeros_like(weights, dtype=torch.promote_types(weights.dtype, torch.float32)),
                grad_hidden=TokenSums(dispatch, hidden_states, sum_dtype, len(plan.chunks)) if needs_hidden else None,
            )
            if in_threads:
                for_each(run, sizes)
            else:
                for index in range(len(sizes)):
                    run(index)
            grad_hidden = None if run.grad_hidden is None else run.grad_hidden.result(stock_bits=False)
            for adapter, made in zip(plan.adapters, run.made, strict=True):
                adapter.end_gradients(layer, made, grad_hidden)
        return (
            None,
            None,
            None,
            None if grad_hidden is None else grad_hidden.to(hidden_states.dtype),
            dispatch.unsort(run.grad_weights).to(expert_weights.dtype) if needs_weights else None,
            *(None if g is None else g.to(f.dtype) for f, g in zip(factors, gradients, strict=True)),
        )


@dataclass
class _Backward:
    """The backward of one chunk after the other: each call writes the rows and factors of its own experts only.

    Attributes:
        kept: what the forward of each chunk left.
        held, made: what each adapter has of all pairs, see `Delta`.
        grad: of the layer's output, (tokens, hidden).
        late: adds up what several chunks have of a gradient.
        grad_weights, grad_hidden: written to; None where not wanted.
    """

    plan: ExpertPlan
    stacks: ExpertStacks
    layer: Layer
    kept: Sequence[Sequence[Tensor]]
    held: Sequence[Tensor]
    made: Sequence[Tensor]
    grad: Tensor
    late: InOrder
    grad_weights: Tensor
    grad_hidden: TokenSums | None

    def __call__(self, index: int) -> None:
        plan, dispatch, stacks = self.plan, self.layer.dispatch, self.stacks
        dtype, factors, gradients = stacks.down.dtype, self.layer.factors, self.layer.gradients
        chunk, first, down = plan.chunks[index], plan.first_groups[index], plan.down_groups[index]
        rows, groups, tokens = chunk.rows, chunk.groups, dispatch.tokens[chunk.rows]
        up, *inners = self.kept[index]
        late: list[tuple[Tensor, Tensor]] = []

        def add_late(target: Tensor, value: Tensor) -> None:
            late.append((target, value))

        grad_out = self.grad.index_select(0, tokens)  # (rows, hidden)
        pair_weights = self.layer.weights[rows].unsqueeze(-1)
        scale: Tensor | None = pair_weights
        if stacks.post_norm is not None:
            normed, grad_norm = replay(stacks.post_norm, inners.pop())
            self.grad_weights[rows] = _row_dot(grad_out, normed)
            grad_out, scale = grad_norm(grad_out * pair_weights), None
        grad_out = grad_out.to(dtype)
        act, grad_activation = stacks.replay_activation(up)
        # Not yet multiplied by the pair's weight: its product with act is the gradient of that weight.
        grad_act = groups.project(grad_out, stacks.down.transpose(1, 2))
        product = ProductBackward(grad_out, act, grad_act, rows, tokens, factors, gradients, add_late, scale)
        self._add_gradients(len(first), down, inners, product, consume=False)
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
            is_read = any(adapter.reads_input and not ranges.is_empty for adapter, ranges in first)
            x = self.layer.hidden_states.index_select(0, tokens) if is_read else None
            product = ProductBackward(grad_up, x, grad_x, rows, tokens, factors, gradients, add_late)
            self._add_gradients(0, first, inners, product, consume=True)
        if self.grad_hidden is not None:
            self.grad_hidden.add(chunk, grad_x)
        self.late.add(index, late)
        for _, ranges in (*first, *down):
            ranges.forget()

    def _add_gradients(
        self,
        start: int,
        adapters: Sequence[tuple[Delta, Groups]],
        inners: Sequence[Tensor],
        product: ProductBackward,
        consume: bool,
    ) -> None:
        """The backward of what adapters, numbered from `start` on, added to one product.

        Args:
            consume: the last of them may overwrite the product's input.
        """
        for number, (adapter, ranges) in enumerate(adapters, start=start):
            held, made = self.held[number], self.made[number]
            adapter.add_gradients(product, ranges, inners[number], held, made, consume and adapter.last)


def _zeros_for(factors: Sequence[Tensor], needed: Sequence[bool], adapters: Sequence[Delta]) -> list[Tensor | None]:
    """What the gradients of the factors are written to; None where they are not wanted."""
    # Added up chunk after chunk, half precision would round each time.
    wide = any(adapter.slots.shared for adapter in adapters)
    dtypes = [torch.promote_types(factor.dtype, torch.float32) if wide else factor.dtype for factor in factors]
    return [
        torch.zeros_like(factor, dtype=dtype) if wanted else None
        for factor, dtype, wanted in zip(factors, dtypes, needed, strict=True)
    ]


def _add(
    adapters: Sequence[tuple[Delta, Groups]], held: Sequence[Tensor], product: Product, consume: bool
) -> list[Tensor]:
    """What adapters add to one product, whose input the last of them may overwrite if `consume`."""
    return [
        adapter.add(product, ranges, own, consume and adapter.last)
        for (adapter, ranges), own in zip(adapters, held, strict=True)
    ]


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


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))
