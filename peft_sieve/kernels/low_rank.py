"""What an adapter adds to a product with a frozen stack, and the gradients of that, on rows sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .dropout import Dropout
from .grouped import Groups


@dataclass(frozen=True)
class Part:
    """One projection's share of packed factors.

    Attributes:
        ranks: where its ranks lie in the factors.
        columns: where its output lies in the output of the stack.
        scaling: factor on B A x.
    """

    ranks: slice
    columns: slice
    scaling: float


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to one product with a stack.

    Attributes:
        slots: expert -> slot, for the adapted experts.
        ids: the experts in the order of their slots, (slots,).
        parts: the projections that share A's input.
        dropout: on the input, None for none.
        a, b: positions of the factors among the function's tensors: (slots, ranks, in) and (slots, ranks, out).
        last: whether no other adapter reads the input after this one.
    """

    slots: Mapping[int, int]
    ids: torch.Tensor
    parts: Sequence[Part]
    dropout: Dropout | None
    a: int
    b: int
    last: bool = False

    def add(
        self, x: torch.Tensor, out: torch.Tensor, groups: Groups, factors: Sequence[torch.Tensor], consume: bool
    ) -> torch.Tensor:
        """Add to `out`, and overwrite `x` if `consume`.

        Returns:
            A x, (rows, ranks), values in the rows of adapted experts only; no rows if there are none of those.
        """
        a, b = factors[self.a], factors[self.b]
        inner = x.new_empty(0 if groups.is_empty else x.shape[0], a.shape[1])
        groups.multiply(x, a.transpose(1, 2), inner, dropout=self.dropout, consume=consume)
        for part in self.parts:
            share = out[:, part.columns]
            groups.multiply(inner[:, part.ranks], b[:, part.ranks], share, alpha=part.scaling, accumulate=True)
        return inner

    def add_gradients(
        self,
        grad_out: torch.Tensor,
        x: torch.Tensor,
        inner: torch.Tensor,
        row_scale: torch.Tensor | None,
        grad_x: torch.Tensor,
        groups: Groups,
        factors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        consume: bool,
    ) -> None:
        """The backward of `add`.

        Args:
            grad_out: gradient of `out`, (rows, out); with `row_scale`, that gradient over it.
            row_scale: factor on each row of the gradient of the factors, (rows, 1); `grad_x` is made without it.
            grad_x: added to, (rows, in).
            gradients: of the factors, written to; None where not wanted.
            consume: `x` may be overwritten.
        """
        if groups.is_empty:
            return
        a, b = factors[self.a], factors[self.b]
        grad_inner = torch.empty_like(inner)
        for part in self.parts:
            groups.multiply(
                grad_out[:, part.columns],
                b[:, part.ranks].transpose(1, 2),
                grad_inner[:, part.ranks],
                alpha=part.scaling,
            )
        groups.multiply(grad_inner, a, grad_x, accumulate=True, dropout=self.dropout, drop_output=True)
        if row_scale is not None:
            # Also on rows that no adapted expert has, whose values are arbitrary and read by nobody.
            grad_inner, inner = scaled(grad_inner, row_scale), scaled(inner, row_scale)
        grad_a, grad_b = gradients[self.a], gradients[self.b]
        if grad_a is not None:
            groups.outer(grad_inner, x, grad_a, dropout=self.dropout, consume=consume)
        if grad_b is not None:
            for part in self.parts:
                groups.outer(inner[:, part.ranks], grad_out[:, part.columns], grad_b[:, part.ranks], alpha=part.scaling)


def scaled(rows: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Each row times its factor, (rows, 1), in the type of the rows."""
    return (rows * row_scale).to(rows.dtype)
