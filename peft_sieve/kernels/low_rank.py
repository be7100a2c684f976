"""Low-rank factors B A beside a frozen stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import Delta, ProductBackward
from .dropout import Dropout
from .groups import Groups, ProductOptions


@dataclass(frozen=True)
class LowRank(Delta):
    """scaling * B A x.

    Attributes:
        dropout: on the input, None for none.
        a, b: positions of the factors among the function's tensors: (slots, ranks, in) and (slots, ranks, out).
    """

    dropout: Dropout | None
    a: int
    b: int

    def add(self, x: Tensor, out: Tensor, groups: Groups, factors: Sequence[Tensor], consume: bool) -> Tensor:
        """As `Delta.add`.

        Returns:
            A x, (rows, ranks), values in the rows of adapted experts only; no rows if there are none of those.
        """
        a, b = factors[self.a], factors[self.b]
        if groups.is_empty:
            return x.new_empty(0, a.shape[1])
        inner = x.new_empty(x.shape[0], a.shape[1])
        groups.multiply(x, a.transpose(1, 2), inner, ProductOptions(dropout=self.dropout, consume=consume))
        for part in self.parts:
            groups.multiply(inner[:, part.ranks], b[:, part.ranks], out[:, part.columns], part.added)
        return inner

    def add_gradients(self, product: ProductBackward, inner: Tensor, groups: Groups, consume: bool) -> None:
        if groups.is_empty:
            return
        a, b = product.factors[self.a], product.factors[self.b]
        grad_inner = torch.empty_like(inner)
        for part in self.parts:
            rows, matrices = product.grad_out[:, part.columns], b[:, part.ranks].transpose(1, 2)
            groups.multiply(rows, matrices, grad_inner[:, part.ranks], part.written)
        options = ProductOptions(accumulate=True, dropout=self.dropout, drop_output=True)
        groups.multiply(grad_inner, a, product.grad_x, options)
        grad_inner, inner = product.scaled(grad_inner), product.scaled(inner)
        grad_a, grad_b = product.gradients[self.a], product.gradients[self.b]
        if grad_a is not None:
            groups.outer(grad_inner, product.x, grad_a, ProductOptions(dropout=self.dropout, consume=consume))
        if grad_b is not None:
            for part in self.parts:
                rows = product.grad_out[:, part.columns]
                groups.outer(inner[:, part.ranks], rows, grad_b[:, part.ranks], part.written)
