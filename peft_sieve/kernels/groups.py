"""Products of row ranges with a matrix each: what experts on sorted rows are made of.

`Groups` says which rows belong to which matrix. `LoopGroups` knows the ranges on the host and makes one product each.
`DeviceGroups` keeps the ranges on the GPU and never waits for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .dropout import Dropout


class ProductOptions(NamedTuple):
    """How a product is written to its output. A tuple, since one is made for each product of each chunk.

    Attributes:
        alpha: factor on the product.
        accumulate: add to the output instead of replacing it.
        dropout: zeroes elements of one operand and scales the others; equal ones zero the same positions of all
            matrices of one width.
        drop_output: apply `dropout` to the product instead, before it is added to anything.
        consume: the operand with dropout is contiguous and not needed afterwards, so it may be overwritten.
    """

    alpha: float = 1.0
    accumulate: bool = False
    dropout: Dropout | None = None
    drop_output: bool = False
    consume: bool = False

    @property
    def factor(self) -> float:
        """`alpha`, with the scaling of the elements that dropout leaves."""
        return self.alpha if self.dropout is None else self.alpha * self.dropout.scale


PLAIN = ProductOptions()

# Takes (where to, what): a sum to which several chunks add.
Late = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Slots:
    """Which of some packed matrices each expert uses.

    Attributes:
        of: expert -> its matrix.
        ids: these experts on the device, those with a matrix of their own first, in the order of the matrices,
            (experts,).
        own: how many have one of their own. The others use the one after those, together.
    """

    of: Mapping[int, int]
    ids: Tensor
    own: int

    @property
    def shared(self) -> bool:
        """Whether some experts use one matrix together."""
        return len(self.of) > self.own


class Groups(ABC):
    """Ranges of rows, one matrix each. Rows in no range are neither read nor written."""

    @abstractmethod
    def select(self, slots: Slots) -> Groups:
        """The ranges of some experts only, for packed matrices."""

    @property
    def is_empty(self) -> bool:
        """Whether no row is in any range, as far as the host knows."""
        return False

    def forget(self) -> None:  # noqa: B027 - most have nothing
        """Let go of what the forward left for the backward."""

    @abstractmethod
    def project(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each range times its matrix: (rows, in), (groups, in, out) -> (rows, out). The ranges cover all rows."""

    @abstractmethod
    def multiply(self, x: Tensor, matrices: Tensor, out: Tensor, options: ProductOptions = PLAIN) -> None:
        """Write each range times its matrix to the same rows of `out`.

        Args:
            x: (rows, in); what dropout is applied to.
            matrices: (groups, in, out).
            out: (rows, out); any strides, but contiguous where its product is dropped.
            options: all of them apply.
        """

    @abstractmethod
    def outer(
        self, x: Tensor, y: Tensor, out: Tensor, options: ProductOptions = PLAIN, late: Late | None = None
    ) -> None:
        """Write the transposed rows of `x` times the same rows of `y`, for each range.

        Args:
            x: (rows, m).
            y: (rows, n); what dropout is applied to.
            out: (groups, m, n), zeros to begin with.
            options: `accumulate` and `drop_output` do not apply.
            late: adds to the matrix that several experts use; None adds at once.
        """
