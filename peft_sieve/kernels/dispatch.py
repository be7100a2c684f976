"""Token-expert pairs sorted by expert, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Token-expert pairs sorted by expert.

    Attributes:
        order: position of each sorted pair in the unsorted, flattened dispatch, (pairs,).
        tokens: token of each pair, (pairs,).
        expert_ids: expert of each pair, those of an expert side by side, (pairs,).
        counts: pairs per expert, (num_experts,).
        top_k: pairs per token.
        rank_major: whether the dispatch was flattened as (top_k, tokens).
    """

    order: Tensor
    tokens: Tensor
    expert_ids: Tensor
    counts: Tensor
    top_k: int
    rank_major: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.order, self.tokens, self.expert_ids, self.counts

    def sort(self, values: Tensor) -> Tensor:
        """One value a pair, as dispatched, (tokens, top_k) -> sorted, (pairs,)."""
        return (values.T if self.rank_major else values).reshape(-1).index_select(0, self.order)

    def unsort(self, values: Tensor) -> Tensor:
        """The inverse of `sort`: (pairs,) -> (tokens, top_k)."""
        flat = torch.empty_like(values).index_copy_(0, self.order, values)
        return flat.view(self.top_k, -1).T if self.rank_major else flat.view(-1, self.top_k)

    def sum_by_token(self, rows: Tensor, stock_bits: bool = True) -> Tensor:
        """Add up the pairs of each token: (pairs, width) -> (tokens, width).

        Args:
            stock_bits: give the bits of stock transformers, which reorders the rows and sums over a dimension.
        """
        positions = self.unsort(torch.arange(self.order.numel(), device=rows.device))
        wide_sums = rows.dtype in (torch.float32, torch.float64)
        if self._in_sequence(rows) or (not stock_bits and rows.device.type == "cpu" and wide_sums):
            # Without a reordered copy of all rows.
            return F.embedding_bag(positions, rows, mode="sum")
        return rows.index_select(0, positions.flatten()).view(-1, self.top_k, rows.shape[-1]).sum(1)

    def _in_sequence(self, rows: Tensor) -> bool:
        """Whether `sum` adds the rows of a token one after the other on this device, with the bits of `embedding_bag`.

        It does so in float32 for up to 16 rows, in the columns that fill its vectors (four at a time, of up to 16).
        """
        fits = self.top_k <= 16 and rows.shape[1] % 64 == 0 and rows.numel() > 0
        return fits and rows.device.type == "cpu" and rows.dtype == torch.float32


def sort_by_expert(
    expert_ids: Tensor, num_experts: int, rank_major: bool = False, order: Sequence[int] | None = None
) -> Dispatch:
    """Sort the pairs of a dispatch by expert, without waiting for the device.

    Args:
        expert_ids: (tokens, top_k).
        num_experts: how many there are.
        rank_major: flatten as (top_k, tokens), and keep that order within an expert.
        order: in which the experts come, all of them; None is ascending.
    """
    num_tokens, top_k = expert_ids.shape
    flat = (expert_ids.T if rank_major else expert_ids).reshape(-1)
    # Stable only where an order within an expert is to be met; otherwise the same call as the stock forward.
    sorted_ids, positions = torch.sort(flat, stable=rank_major)
    if order is not None:
        # A row keeps its place within its expert, which may show in the bits of its products.
        moved = torch.sort(_places(sorted_ids, order), stable=True).indices
        sorted_ids, positions = sorted_ids[moved], positions[moved]
    tokens = positions % num_tokens if rank_major else positions // top_k
    # histc, not bincount: no copy to the host. It takes no integers on the CPU.
    values = sorted_ids.int() if sorted_ids.is_cuda else sorted_ids.float()
    counts = torch.histc(values, bins=num_experts, min=0, max=num_experts - 1).to(torch.int64)
    return Dispatch(positions, tokens, sorted_ids, counts, top_k, rank_major)


def _places(expert_ids: Tensor, order: Sequence[int]) -> Tensor:
    """Where each expert comes in an order; ids of no expert stay behind all of them."""
    place = torch.empty(len(order), dtype=expert_ids.dtype)
    place[list(order)] = torch.arange(len(order), dtype=expert_ids.dtype)
    known = place.to(expert_ids.device)[expert_ids.clamp(max=len(order) - 1)]
    return torch.where(expert_ids < len(order), known, expert_ids)
