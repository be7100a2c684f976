"""Low-rank factors B A beside a frozen stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import Delta, PackedPart, Product, ProductBackward
from .dropout import Dropout
from .groups import Groups, ProductOptions


@dataclass(frozen=True)
class LowRank(Delta):
    """scaling * B A x.

    Attributes:
        dropout: on the input, None for none.
        a, b: positions of the factors among the function's tensors: (slots, ranks, in) and (slots, ranks, out), or
            (1, ranks, out) for one B for all.
    """

    dropout: Dropout | None
    a: int
    b: int

    def add(self, product: Product, groups: Groups, held: Tensor, consume: bool) -> Tensor:
        """As `Delta.add`.

        Returns:
            A x, (rows, ranks), values in the rows of adapted experts only; no rows if there are none of those.
        """
        x, a = product.x, product.factors[self.a]
        if groups.is_empty:
            return x.new_empty(0, a.shape[1])
        inner = x.new_empty(x.shape[0], a.shape[1])
        groups.multiply(x, a.transpose(1, 2), inner, ProductOptions(dropout=self.dropout, consume=consume))
        b = product.factors[self.b].expand(len(a), -1, -1)
        for part in self.parts:
            groups.multiply(inner[:, part.ranks], b[:, part.ranks], product.out[:, part.columns], part.added)
        return inner

    def add_gradients(
        self, product: ProductBackward, groups: Groups, inner: Tensor, held: Tensor, made: Tensor, consume: bool
    ) -> None:
        if groups.is_empty:
            return
        assert product.x is not None
        a, grad_a = product.factors[self.a], product.gradients[self.a]
        b = product.factors[self.b].expand(len(a), -1, -1)
        grad_inner = torch.empty_like(inner)
        for part in self.parts:
            rows, matrices = product.grad_out[:, part.columns], b[:, part.ranks].transpose(1, 2)
            groups.multiply(rows, matrices, grad_inner[:, part.ranks], part.written)
        options = ProductOptions(accumulate=True, dropout=self.dropout, drop_output=True)
        groups.multiply(grad_inner, a, product.grad_x, options)
        grad_inner, inner = product.scaled(grad_inner), product.scaled(inner)
        if grad_a is not None:
            options = ProductOptions(dropout=self.dropout, consume=consume)
            groups.outer(grad_inner, product.x, grad_a, options, product.late)
        for part in self.parts:
            self._add_gradient_of_b(product, groups, inner, part)

    def _add_gradient_of_b(self, product: ProductBackward, groups: Groups, inner: Tensor, part: PackedPart) -> None:
        gradient = product.gradients[self.b]
        if gradient is None:
            return
        gradient, rows = gradient[:, part.ranks], product.grad_out[:, part.columns]
        slots = len(product.factors[self.a])
        if len(gradient) == slots:
            groups.outer(inner[:, part.ranks], rows, gradient, part.written, product.late)
        else:
            by_slot = gradient.new_zeros(slots, *gradient.shape[1:])
            groups.outer(inner[:, part.ranks], rows, by_slot, part.written)
            product.late(gradient, by_slot.sum(0, keepdim=True))
