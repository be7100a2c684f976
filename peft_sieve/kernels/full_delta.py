"""A difference of full size beside a frozen stack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .delta import Delta, Product, ProductBackward
from .groups import Groups


@dataclass(frozen=True)
class FullDelta(Delta):
    """scaling * D x; the `ranks` of the parts are rows of the difference D.

    Attributes:
        delta: position of the difference among the function's tensors: (slots, out, in).
    """

    delta: int

    def add(self, product: Product, groups: Groups, held: Tensor, consume: bool) -> Tensor:
        """As `Delta.add`.

        Returns:
            Nothing that a backward needs, (0, 0).
        """
        if not groups.is_empty:
            for part in self.parts:
                matrices = product.factors[self.delta][:, part.ranks].transpose(1, 2)
                groups.multiply(product.x, matrices, product.out[:, part.columns], part.added)
        return product.x.new_empty(0, 0)

    def add_gradients(
        self, product: ProductBackward, groups: Groups, inner: Tensor, held: Tensor, made: Tensor, consume: bool
    ) -> None:
        if groups.is_empty:
            return
        assert product.x is not None
        gradient = product.gradients[self.delta]
        for part in self.parts:
            rows = product.grad_out[:, part.columns]
            matrices = product.factors[self.delta][:, part.ranks]
            groups.multiply(rows, matrices, product.grad_x, part.added)
            if gradient is not None:
                groups.outer(product.scaled(rows), product.x, gradient[:, part.ranks], part.written)
