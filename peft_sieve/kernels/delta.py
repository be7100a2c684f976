"""What one adapter adds to one product with a frozen stack, and the gradients of that, on rows sorted by expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from .dispatch import Dispatch
from .groups import Groups, Late, ProductOptions, Slots


@dataclass(frozen=True)
class PackedPart:
    """One projection's share of packed tensors.

    Attributes:
        ranks: where its rows lie in them.
        columns: where its output lies in the output of the stack.
        scaling: factor on what is added.
    """

    ranks: slice
    columns: slice
    scaling: float

    @cached_property
    def written(self) -> ProductOptions:
        """To write a product times `scaling`."""
        return ProductOptions(alpha=self.scaling)

    @cached_property
    def added(self) -> ProductOptions:
        """To add a product times `scaling`."""
        return ProductOptions(alpha=self.scaling, accumulate=True)


@dataclass
class Layer:
    """What a pass has of the whole layer, for what does not depend on the expert.

    Attributes:
        hidden_states: in the type of the stacks, (tokens, hidden).
        weights: of the sorted pairs, (pairs,).
        factors: the tensors of all deltas, in the type of the stacks.
        gradients: of the factors, written to; None where not wanted. Empty in the forward.
    """

    dispatch: Dispatch
    hidden_states: Tensor
    weights: Tensor
    factors: Sequence[Tensor]
    gradients: Sequence[Tensor | None] = ()

    def nothing(self) -> Tensor:
        return self.hidden_states.new_empty(0)


@dataclass
class Product:
    """One product of a chunk, for the deltas that add to it.

    Attributes:
        x: the product's input, (rows, in).
        out: its output, (rows, out), added to.
        rows: which of the sorted pairs these are.
        tokens: of each row, (rows,).
        factors: the tensors of all deltas.
    """

    x: Tensor
    out: Tensor
    rows: slice
    tokens: Tensor
    factors: Sequence[Tensor]


@dataclass
class ProductBackward:
    """What the backward of a product has for the deltas that were added to it.

    Attributes:
        grad_out: gradient of the product's output, (rows, out); with `row_scale`, that gradient over it.
        x: the product's input, (rows, in); None if no delta reads it.
        grad_x: added to, (rows, in).
        rows: which of the sorted pairs these are.
        tokens: of each row, (rows,).
        factors: the tensors of all deltas.
        gradients: of the factors, written to; None where not wanted.
        late: adds to gradients that other chunks add to.
        row_scale: factor on each row of the gradient of the factors, (rows, 1); `grad_x` is made without it.
    """

    grad_out: Tensor
    x: Tensor | None
    grad_x: Tensor
    rows: slice
    tokens: Tensor
    factors: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    late: Late
    row_scale: Tensor | None = None

    def scaled(self, rows: Tensor) -> Tensor:
        """Each row times its factor, in the type of the rows. Rows that no adapted expert has may hold anything."""
        return rows if self.row_scale is None else (rows * self.row_scale).to(rows.dtype)


@dataclass(frozen=True)
class Delta(ABC):
    """What one adapter adds to one product with a stack.

    `add` and `add_gradients` are called for each chunk, possibly in several threads. `begin`, `end` and their backwards
    are called once, before and after all chunks.

    Attributes:
        slots: of the adapted experts.
        parts: the projections that share the input.
        last: whether no other adapter reads the input after this one.
    """

    slots: Slots
    parts: Sequence[PackedPart]
    last: bool = field(default=False, kw_only=True)

    @property
    def reads_input(self) -> bool:
        """Whether `add_gradients` reads the product's input."""
        return True

    def begin(self, layer: Layer) -> Tensor:
        """What `add`, `end` and the backward are given as `held`."""
        return layer.nothing()

    @abstractmethod
    def add(self, product: Product, groups: Groups, held: Tensor, consume: bool) -> Tensor:
        """Add to the product's output what the adapter makes of its input; overwrite that if `consume`.

        Returns:
            What the backward of this chunk needs.
        """

    def end(self, layer: Layer, held: Tensor, result: Tensor) -> None:  # noqa: B027 - most have nothing
        """Add to the layer's result, (tokens, hidden), what is the same for all experts."""

    def begin_gradients(self, layer: Layer, held: Tensor, grad: Tensor) -> Tensor:
        """The backward of `end`.

        Args:
            grad: of the layer's result, in the type of the stacks, (tokens, hidden).

        Returns:
            What `add_gradients` and `end_gradients` are given as `made`.
        """
        return layer.nothing()

    @abstractmethod
    def add_gradients(
        self, product: ProductBackward, groups: Groups, inner: Tensor, held: Tensor, made: Tensor, consume: bool
    ) -> None:
        """The backward of `add`.

        Args:
            inner: what `add` returned.
            consume: the product's input may be overwritten.
        """

    def end_gradients(self, layer: Layer, made: Tensor, grad_hidden: Tensor | None) -> None:  # noqa: B027
        """The backward of `begin`: adds to the gradient of the hidden states, (tokens, hidden), if that is wanted."""
