"""Averages over samples of what a layer's router does: every sample counts the same, however long it is."""

from __future__ import annotations

import torch


class SampleAverages:
    """Means over samples of a sample's means over its tokens, of one layer, kept on its device until the end.

    A row of a batch is a sample. A sample's tokens may come in several dispatches of one batch, if a layer is used
    more than once.

    Attributes:
        num_rows: samples in the batch that is dispatched; set before it.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_rows = 0
        self._known = self._known_before = True  # before the present batch
        # Of the present batch: (rows, num_experts + 1) each, and the tokens seen, (rows,).
        self._batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._sums: torch.Tensor | None = None  # over samples, (2, num_experts)

    def add(self, bins: torch.Tensor, weights: torch.Tensor, real: torch.Tensor | None) -> None:
        """Take one dispatch.

        Args:
            bins: expert of each slot, (tokens, top_k), samples one after the other; num_experts where none counts.
            weights: of the same shape.
            real: which tokens are not padding, (tokens,); None if all are.
        """
        num_tokens, top_k = bins.shape
        if self.num_rows == 0 or num_tokens % self.num_rows:
            # Not a fixed number of tokens for each sample: whose they are is unknown.
            self._known = False
            return
        if self._batch is None:
            share, mass = (
                torch.zeros(self.num_rows, self.num_experts + 1, dtype=torch.float64, device=bins.device)
                for _ in range(2)
            )
            self._batch = share, mass, torch.zeros(self.num_rows, dtype=torch.float64, device=bins.device)
        share, mass, seen = self._batch
        by_row = bins.reshape(self.num_rows, -1)
        share.scatter_add_(1, by_row, torch.full(by_row.shape, 1 / top_k, dtype=torch.float64, device=bins.device))
        mass.scatter_add_(1, by_row, weights.reshape(self.num_rows, -1).to(torch.float64))
        seen += num_tokens // self.num_rows if real is None else real.view(self.num_rows, -1).sum(1)

    def drop_batch(self) -> None:
        """The batch's samples will come again."""
        self._batch, self._known = None, self._known_before

    def end_batch(self) -> None:
        """The batch's samples are complete."""
        self._known_before = self._known
        if self._batch is None:
            return
        share, mass, seen = self._batch
        means = torch.stack((share, mass))[..., :-1] / seen.clamp(min=1).unsqueeze(-1)  # (2, rows, num_experts)
        self._sums = means.sum(1) if self._sums is None else self._sums + means.sum(1)
        self._batch = None

    def means(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Share and gate weight of each expert, (num_experts,) each; None if samples could not be told apart.

        Args:
            num_samples: over which the means are; one that did not reach the layer counts with zeros.
        """
        if not self._known:
            return None
        if self._sums is None:
            nothing = torch.zeros(self.num_experts, dtype=torch.float64)
            return nothing, nothing.clone()
        share, mass = (self._sums / max(num_samples, 1)).cpu()
        return share, mass
