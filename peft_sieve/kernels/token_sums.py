"""What experts made of their rows, added up for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import Chunk
from .dispatch import Dispatch
from .reused_memory import scratch


class TokenSums:
    """Sums the pairs of each token, chunk after chunk: (rows, hidden) ... -> (tokens, hidden)."""

    def __init__(self, dispatch: Dispatch, hidden_states: Tensor, dtype: torch.dtype, num_chunks: int) -> None:
        self.dispatch = dispatch
        self.at_once = num_chunks == 1
        num_tokens, width = hidden_states.shape
        if dispatch.rank_major:
            self.rows = hidden_states.new_zeros((num_tokens, width), dtype=dtype)
        elif not self.at_once:
            # Here, before any chunk: those may come from several threads.
            self.rows = scratch((dispatch.order.numel(), width), dtype, hidden_states.device)

    def add(self, chunk: Chunk, rows: Tensor, weights: Tensor | None = None) -> None:
        """Take the rows of one chunk, (rows, hidden), times their weights, (rows,)."""
        if self.dispatch.rank_major:
            rows = rows if weights is None else rows * weights.unsqueeze(-1)
            self.rows.index_add_(0, self.dispatch.tokens[chunk.rows], rows.to(self.rows.dtype))
        elif self.at_once:
            self.rows = rows if weights is None else rows * weights.unsqueeze(-1)
        elif weights is None:
            self.rows[chunk.rows] = rows
        else:
            torch.mul(rows, weights.unsqueeze(-1), out=self.rows[chunk.rows])

    def result(self, stock_bits: bool = True) -> Tensor:
        return self.rows if self.dispatch.rank_major else self.dispatch.sum_by_token(self.rows, stock_bits)
