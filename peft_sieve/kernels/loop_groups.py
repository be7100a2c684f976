"""Products of row ranges that the host knows, one at a time.

For any device and type. On the CPU nothing is faster: there `torch.nn.functional.grouped_mm` is such a loop, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .dropout import Dropout, dropped_positions
from .groups import PLAIN, Groups, Late, ProductOptions, Slots


@dataclass(frozen=True)
class LoopGroups(Groups):
    """Ranges known on the host.

    Attributes:
        spans: (matrix, start, end), the ranges that have rows.
        first_row: which row of the whole dispatch row 0 is, for dropout.
        shared: the matrix that may have several ranges, here and in other chunks; None for none.
    """

    spans: Sequence[tuple[int, int, int]]
    first_row: int = 0
    shared: int | None = None
    # What the forward drew, for the backward. Drawing again would give the same.
    _drawn: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.spans

    def forget(self) -> None:
        self._drawn.clear()

    def select(self, slots: Slots) -> LoopGroups:
        spans: list[tuple[int, int, int]] = []
        for expert, start, end in self.spans:
            slot = slots.of.get(expert)
            if slot is None:
                continue
            if spans and spans[-1][0] == slot and spans[-1][2] == start:
                start = spans.pop()[1]  # neighbours with one matrix make one product
            spans.append((slot, start, end))
        return LoopGroups(spans, self.first_row, slots.own if slots.shared else None)

    def project(self, x: Tensor, matrices: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], matrices.shape[2])
        for group, start, end in self.spans:
            torch.mm(x[start:end], matrices[group], out=out[start:end])
        return out

    def multiply(self, x: Tensor, matrices: Tensor, out: Tensor, options: ProductOptions = PLAIN) -> None:
        alpha, beta, dropout = options.factor, int(options.accumulate), options.dropout
        for group, start, end in self.spans:
            rows, target = x[start:end], out[start:end]
            if dropout is None:
                target.addmm_(rows, matrices[group], beta=beta, alpha=alpha)
            elif options.drop_output:
                flat, positions = target.view(-1), self._positions(dropout, start, target)
                # Dropped elements get back what they were: no product has to be kept apart.
                before = flat[positions] if options.accumulate else flat.new_zeros(())
                target.addmm_(rows, matrices[group], beta=beta, alpha=alpha)
                flat[positions] = before
            else:
                rows = self._dropped(rows, dropout, start, options.consume)
                target.addmm_(rows, matrices[group], beta=beta, alpha=alpha)

    def outer(
        self, x: Tensor, y: Tensor, out: Tensor, options: ProductOptions = PLAIN, late: Late | None = None
    ) -> None:
        alpha, dropout = options.factor, options.dropout
        for group, start, end in self.spans:
            rows = y[start:end]
            if dropout is not None:
                rows = self._dropped(rows, dropout, start, options.consume)
            product = (x[start:end].T @ rows).mul_(alpha)
            if group != self.shared:
                # By value: the gradient of a float32 factor may come from operands in half precision.
                out[group] = product
            elif late is not None:
                late(out[group], product)
            else:
                out[group] += product

    def _dropped(self, rows: Tensor, dropout: Dropout, start: int, consume: bool) -> Tensor:
        """Rows with zeros where they are dropped, not yet scaled."""
        if not consume:
            rows = rows.clone(memory_format=torch.contiguous_format)
        rows.view(-1).index_fill_(0, self._positions(dropout, start, rows), 0)
        return rows

    def _positions(self, dropout: Dropout, start: int, rows: Tensor) -> Tensor:
        key = (dropout.seed, start)
        if key not in self._drawn:
            positions = dropped_positions(dropout, self.first_row + start, rows.numel())
            self._drawn[key] = positions.to(rows.device)
        return self._drawn[key]
