"""Low-rank factors of which the outer one is the same for all experts (shared-outer LoRA).

What does not depend on the expert is done for each token, not for each pair: A x before the experts of the first
product, and B z after the sum over the experts of the second, z being the weighted sum of what their own factors give.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .delta import Delta, Layer, Product, ProductBackward
from .dropout import Dropout, drop
from .groups import Groups, ProductOptions


@dataclass(frozen=True)
class SharedInput(Delta):
    """scaling * B A x with one A for all experts, x being the layer's input.

    Attributes:
        dropout: on the input, the same for all experts of a token; None for none.
        a, b: positions of the factors among the function's tensors: (1, ranks, hidden) and (slots, ranks, out).
    """

    dropout: Dropout | None
    a: int
    b: int

    @property
    def reads_input(self) -> bool:
        return False

    @property
    def _scale(self) -> float:
        return 1.0 if self.dropout is None else self.dropout.scale

    def begin(self, layer: Layer) -> Tensor:
        """A x, (tokens, ranks)."""
        x = drop(self.dropout, layer.hidden_states)
        return (x @ layer.factors[self.a][0].T).mul_(self._scale)

    def add(self, product: Product, groups: Groups, held: Tensor, consume: bool) -> Tensor:
        if not groups.is_empty:
            inner, b = held.index_select(0, product.tokens), product.factors[self.b]  # (rows, ranks)
            for part in self.parts:
                groups.multiply(inner[:, part.ranks], b[:, part.ranks], product.out[:, part.columns], part.added)
        return held.new_empty(0)

    def begin_gradients(self, layer: Layer, held: Tensor, grad: Tensor) -> Tensor:
        """Of A x for each pair, (pairs, ranks), zero for experts without an adapter."""
        return held.new_zeros(layer.dispatch.order.numel(), held.shape[1])

    def add_gradients(
        self, product: ProductBackward, groups: Groups, inner: Tensor, held: Tensor, made: Tensor, consume: bool
    ) -> None:
        if groups.is_empty:
            return
        inner, grad_inner = held.index_select(0, product.tokens), made[product.rows]  # (rows, ranks)
        b, grad_b = product.factors[self.b], product.gradients[self.b]
        for part in self.parts:
            rows = product.grad_out[:, part.columns]
            groups.multiply(rows, b[:, part.ranks].transpose(1, 2), grad_inner[:, part.ranks], part.written)
            if grad_b is not None:
                groups.outer(inner[:, part.ranks], rows, grad_b[:, part.ranks], part.written, product.late)

    def end_gradients(self, layer: Layer, made: Tensor, grad_hidden: Tensor | None) -> None:
        grad = layer.dispatch.sum_by_token(made, stock_bits=False).mul_(self._scale)  # (tokens, ranks)
        grad_a = layer.gradients[self.a]
        if grad_a is not None:
            grad_a[0] = grad.T @ drop(self.dropout, layer.hidden_states)
        if grad_hidden is not None:
            grad_hidden += drop(self.dropout, grad @ layer.factors[self.a][0])


@dataclass(frozen=True)
class SharedOutput(Delta):
    """scaling * B A x with one B for all experts, added to what the layer returns.

    Only where nothing comes between the second product and the weighted sum.

    Attributes:
        dropout: on the input, None for none.
        a, b: positions of the factors among the function's tensors: (slots, rank, in) and (1, rank, hidden).
    """

    dropout: Dropout | None
    a: int
    b: int

    def begin(self, layer: Layer) -> Tensor:
        """Room for A x of each pair, (pairs, rank), zero for experts without an adapter."""
        return layer.hidden_states.new_zeros(layer.dispatch.order.numel(), layer.factors[self.a].shape[1])

    def add(self, product: Product, groups: Groups, held: Tensor, consume: bool) -> Tensor:
        if not groups.is_empty:
            a = product.factors[self.a].transpose(1, 2)
            options = ProductOptions(dropout=self.dropout, consume=consume)
            groups.multiply(product.x, a, held[product.rows], options)
        return held.new_empty(0)

    def end(self, layer: Layer, held: Tensor, result: Tensor) -> None:
        b = layer.factors[self.b][0].to(result.dtype)
        result.addmm_(self._summed(layer, held).to(result.dtype), b, alpha=self.parts[0].scaling)

    def _summed(self, layer: Layer, held: Tensor) -> Tensor:
        """The weighted sum over the experts of each token, (tokens, rank)."""
        return layer.dispatch.sum_by_token(held * layer.weights.unsqueeze(-1), stock_bits=False)

    def begin_gradients(self, layer: Layer, held: Tensor, grad: Tensor) -> Tensor:
        """Of the weighted sum, (tokens, rank)."""
        scaling, grad_b = self.parts[0].scaling, layer.gradients[self.b]
        if grad_b is not None:
            grad_b[0] = (self._summed(layer, held).to(grad.dtype).T @ grad).mul_(scaling)
        return (grad @ layer.factors[self.b][0].T).mul_(scaling)

    def add_gradients(
        self, product: ProductBackward, groups: Groups, inner: Tensor, held: Tensor, made: Tensor, consume: bool
    ) -> None:
        if groups.is_empty:
            return
        assert product.x is not None
        a, grad_a = product.factors[self.a], product.gradients[self.a]
        grad_inner = made.index_select(0, product.tokens)  # (rows, rank), not yet times the pair's weight
        options = ProductOptions(accumulate=True, dropout=self.dropout, drop_output=True)
        groups.multiply(grad_inner, a, product.grad_x, options)
        if grad_a is not None:
            options = ProductOptions(dropout=self.dropout, consume=consume)
            groups.outer(product.scaled(grad_inner), product.x, grad_a, options, product.late)
