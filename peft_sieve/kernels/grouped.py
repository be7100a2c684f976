"""Products of row ranges with a matrix each: what experts on sorted rows are made of.

`Groups` says which rows belong to which matrix. `LoopGroups` knows the ranges on the host and makes one product each:
any device and any type, and on the CPU as fast as it gets, since the CPU kernel behind
`torch.nn.functional.grouped_mm` is such a loop. `DeviceGroups` keeps the ranges on the GPU and never waits for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .dropout import Dropout, dropped_positions


class Groups(ABC):
    """Ranges of rows, one matrix each. Rows in no range are neither read nor written."""

    @abstractmethod
    def select(self, slots: Mapping[int, int], ids: torch.Tensor) -> Groups:
        """The ranges of some matrices only, under other numbers.

        Args:
            slots: matrix -> its new number.
            ids: the matrices in the order of their new numbers, (slots,), on the device.
        """

    @property
    def is_empty(self) -> bool:
        """Whether no row is in any range, as far as the host knows."""
        return False

    def forget(self) -> None:  # noqa: B027 - most have nothing
        """Let go of what the forward left for the backward."""

    @abstractmethod
    def project(self, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Each range times its matrix: (rows, in), (groups, in, out) -> (rows, out). The ranges cover all rows."""

    @abstractmethod
    def multiply(
        self,
        x: torch.Tensor,
        matrices: torch.Tensor,
        out: torch.Tensor,
        *,
        alpha: float = 1.0,
        accumulate: bool = False,
        dropout: Dropout | None = None,
        drop_output: bool = False,
        consume: bool = False,
    ) -> None:
        """Write `alpha` times each range times its matrix to the same rows of `out`, or add it to them.

        Args:
            x: (rows, in).
            matrices: (groups, in, out).
            out: (rows, out); any strides, but contiguous where its product is dropped.
            dropout: applied to `x`, or to the product if `drop_output`.
            consume: `x` is contiguous and not needed afterwards, so dropout may overwrite it.
        """

    @abstractmethod
    def outer(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        out: torch.Tensor,
        *,
        alpha: float = 1.0,
        dropout: Dropout | None = None,
        consume: bool = False,
    ) -> None:
        """Write `alpha` times the transposed rows of `x` times the same rows of `y`, for each range.

        Args:
            x: (rows, m).
            y: (rows, n).
            out: (groups, m, n), zeros to begin with.
            dropout: applied to `y`.
            consume: `y` is contiguous and not needed afterwards, so dropout may overwrite it.
        """


@dataclass(frozen=True)
class LoopGroups(Groups):
    """Ranges known on the host.

    Attributes:
        spans: (matrix, start, end), the ranges that have rows.
        first_row: which row of the whole dispatch row 0 is, for dropout.
    """

    spans: Sequence[tuple[int, int, int]]
    first_row: int = 0
    # What the forward drew, for the backward. Drawing again would give the same.
    _drawn: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.spans

    def forget(self) -> None:
        self._drawn.clear()

    def select(self, slots: Mapping[int, int], ids: torch.Tensor) -> LoopGroups:
        return LoopGroups([(slots[g], start, end) for g, start, end in self.spans if g in slots], self.first_row)

    def project(self, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], matrices.shape[2])
        for group, start, end in self.spans:
            torch.mm(x[start:end], matrices[group], out=out[start:end])
        return out

    def multiply(
        self,
        x: torch.Tensor,
        matrices: torch.Tensor,
        out: torch.Tensor,
        *,
        alpha: float = 1.0,
        accumulate: bool = False,
        dropout: Dropout | None = None,
        drop_output: bool = False,
        consume: bool = False,
    ) -> None:
        alpha = alpha if dropout is None else alpha * dropout.scale
        beta = 1 if accumulate else 0
        for group, start, end in self.spans:
            rows, target = x[start:end], out[start:end]
            if dropout is None:
                target.addmm_(rows, matrices[group], beta=beta, alpha=alpha)
            elif drop_output:
                flat, positions = target.view(-1), self._positions(dropout, start, target)
                # Dropped elements get back what they were: no product has to be kept apart.
                before = flat[positions] if accumulate else flat.new_zeros(())
                target.addmm_(rows, matrices[group], beta=beta, alpha=alpha)
                flat[positions] = before
            else:
                target.addmm_(self._dropped(rows, dropout, start, consume), matrices[group], beta=beta, alpha=alpha)

    def outer(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        out: torch.Tensor,
        *,
        alpha: float = 1.0,
        dropout: Dropout | None = None,
        consume: bool = False,
    ) -> None:
        alpha = alpha if dropout is None else alpha * dropout.scale
        for group, start, end in self.spans:
            rows = y[start:end]
            if dropout is not None:
                rows = self._dropped(rows, dropout, start, consume)
            # By value: the gradient of a float32 factor may come from operands in half precision.
            out[group] = (x[start:end].T @ rows).mul_(alpha)

    def _dropped(self, rows: torch.Tensor, dropout: Dropout, start: int, consume: bool) -> torch.Tensor:
        """Rows with zeros where they are dropped, not yet scaled."""
        if not consume:
            rows = rows.clone(memory_format=torch.contiguous_format)
        rows.view(-1).index_fill_(0, self._positions(dropout, start, rows), 0)
        return rows

    def _positions(self, dropout: Dropout, start: int, rows: torch.Tensor) -> torch.Tensor:
        key = (dropout.seed, start)
        if key not in self._drawn:
            positions = dropped_positions(dropout, self.first_row + start, rows.numel())
            self._drawn[key] = positions.to(rows.device)
        return self._drawn[key]


@dataclass(frozen=True)
class DeviceGroups(Groups):
    """Ranges known to the device only.

    Attributes:
        starts, ends: int32, (groups,); ascending and disjoint.
    """

    starts: torch.Tensor
    ends: torch.Tensor

    def select(self, slots: Mapping[int, int], ids: torch.Tensor) -> DeviceGroups:
        return DeviceGroups(self.starts[ids], self.ends[ids])

    def project(self, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, matrices, offs=self.ends)

    def multiply(
        self,
        x: torch.Tensor,
        matrices: torch.Tensor,
        out: torch.Tensor,
        *,
        alpha: float = 1.0,
        accumulate: bool = False,
        dropout: Dropout | None = None,
        drop_output: bool = False,
        consume: bool = False,
    ) -> None:
        from .triton_groups import multiply

        multiply(
            x,
            matrices,
            self.starts,
            self.ends,
            out,
            alpha=alpha,
            accumulate=accumulate,
            dropout=dropout,
            drop_output=drop_output,
        )

    def outer(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        out: torch.Tensor,
        *,
        alpha: float = 1.0,
        dropout: Dropout | None = None,
        consume: bool = False,
    ) -> None:
        from .triton_groups import outer

        outer(x, y, self.starts, self.ends, out, alpha=alpha, dropout=dropout)
