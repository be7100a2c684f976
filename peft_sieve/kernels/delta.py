"""What one adapter adds to one product with a frozen stack, and the gradients of that, on rows sorted by expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from .groups import Groups, ProductOptions


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
class ProductBackward:
    """What the backward of a product has for the deltas that were added to it.

    Attributes:
        grad_out: gradient of the product's output, (rows, out); with `row_scale`, that gradient over it.
        x: the product's input, (rows, in).
        grad_x: added to, (rows, in).
        factors: the tensors of all deltas.
        gradients: of the factors, written to; None where not wanted.
        row_scale: factor on each row of the gradient of the factors, (rows, 1); `grad_x` is made without it.
    """

    grad_out: Tensor
    x: Tensor
    grad_x: Tensor
    factors: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    row_scale: Tensor | None = None

    def scaled(self, rows: Tensor) -> Tensor:
        """Each row times its factor, in the type of the rows. Rows that no adapted expert has may hold anything."""
        return rows if self.row_scale is None else (rows * self.row_scale).to(rows.dtype)


@dataclass(frozen=True)
class Delta(ABC):
    """What one adapter adds to one product with a stack.

    Attributes:
        slots: expert -> slot, for the adapted experts.
        ids: the experts in the order of their slots, (slots,).
        parts: the projections that share the input.
        last: whether no other adapter reads the input after this one.
    """

    slots: Mapping[int, int]
    ids: Tensor
    parts: Sequence[PackedPart]
    last: bool = field(default=False, kw_only=True)

    @abstractmethod
    def add(self, x: Tensor, out: Tensor, groups: Groups, factors: Sequence[Tensor], consume: bool) -> Tensor:
        """Add to `out`, (rows, out), what the adapter makes of `x`, (rows, in); overwrite `x` if `consume`.

        Returns:
            What the backward needs.
        """

    @abstractmethod
    def add_gradients(self, product: ProductBackward, inner: Tensor, groups: Groups, consume: bool) -> None:
        """The backward of `add`.

        Args:
            inner: what `add` returned.
            consume: the product's input may be overwritten.
        """
