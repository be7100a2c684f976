"""What a difference of full size adds to a product with a frozen stack, and its gradients, on rows sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .grouped import Groups
from .low_rank import Part, scaled


@dataclass(frozen=True)
class FullDelta:
    """What one adapter adds to one product with a stack, used as `LowRank` is.

    Attributes:
        slots: expert -> slot, for the adapted experts.
        ids: the experts in the order of their slots, (slots,).
        parts: the projections that share the input; their `ranks` are rows of the difference.
        delta: position of the difference among the function's tensors: (slots, out, in).
        last: whether no other adapter reads the input after this one.
    """

    slots: Mapping[int, int]
    ids: torch.Tensor
    parts: Sequence[Part]
    delta: int
    last: bool = False

    def add(
        self, x: torch.Tensor, out: torch.Tensor, groups: Groups, factors: Sequence[torch.Tensor], consume: bool
    ) -> torch.Tensor:
        """Add to `out`, as `LowRank.add`.

        Returns:
            Nothing that a backward needs, (0, 0).
        """
        for part in self.parts:
            matrices = factors[self.delta][:, part.ranks].transpose(1, 2)
            groups.multiply(x, matrices, out[:, part.columns], alpha=part.scaling, accumulate=True)
        return x.new_empty(0, 0)

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
        """The backward of `add`; arguments as for `LowRank.add_gradients`."""
        if groups.is_empty:
            return
        gradient = gradients[self.delta]
        for part in self.parts:
            rows = grad_out[:, part.columns]
            groups.multiply(rows, factors[self.delta][:, part.ranks], grad_x, alpha=part.scaling, accumulate=True)
            if gradient is not None:
                rows = rows if row_scale is None else scaled(rows, row_scale)
                groups.outer(rows, x, gradient[:, part.ranks], alpha=part.scaling)
