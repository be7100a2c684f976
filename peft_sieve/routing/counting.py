"""Count what routers dispatch: a counter for each layer, and hooks that feed it for as long as a block runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SieveError
from ..moe.families.family import MoEFamily
from .encoder_decoder import decoder_mask
from .masks import token_mask
from .sample_averages import SampleAverages

_PROFILING_ADVICE = "Profile with batch_size=1 (calib_batch_size), or on batches of one row without padding"


class PaddingUnknown(SieveError):
    """Which of the tokens that an experts module receives are padding is not known; they would be without padding."""


class DispatchCounter:
    """Counts and gate weights of one layer, kept on its device until the end.

    Args:
        num_experts: of the layer.
        averages: also fed, if given.
        advice: what to do if padding cannot be told from tokens: a sentence of the error.

    Attributes:
        real: which of the flattened tokens of the next dispatches are no padding; None if all are.
        top_k: the most experts that a token went to.
    """

    def __init__(
        self, num_experts: int, advice: str = _PROFILING_ADVICE, averages: SampleAverages | None = None
    ) -> None:
        self.num_experts = num_experts
        self.averages = averages
        self.advice = advice
        self.top_k = 0
        self.real: torch.Tensor | None = None
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def add(self, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
        """Count one dispatch, ids and weights of shape (tokens, top_k). Nothing waits for the device."""
        self.top_k = max(self.top_k, expert_ids.shape[-1])
        # One bin more than experts: dropped slots (id == num_experts) and padding end up there.
        bins = expert_ids.long().clamp(max=self.num_experts)
        if self.real is not None:
            if self.real.numel() != bins.shape[0]:
                raise PaddingUnknown(
                    f"A batch of {self.real.numel()} tokens with padding reached an experts module as {bins.shape[0]} "
                    f"tokens, where padding cannot be told from tokens. {self.advice}."
                )
            self.real = self.real.to(bins.device)
            bins = bins.masked_fill(~self.real.unsqueeze(-1), self.num_experts)
        if self._sums is None:
            counts, mass = (
                torch.zeros(self.num_experts + 1, dtype=dtype, device=bins.device)
                for dtype in (torch.int64, torch.float64)
            )
            self._sums = counts, mass
        if self.averages is not None:
            self.averages.add(bins, expert_weights, self.real)
        counts, mass = self._sums
        flat = bins.reshape(-1)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        mass.scatter_add_(0, flat, expert_weights.reshape(-1).to(torch.float64))

    def copy(self) -> DispatchCounter:
        """Another counter with the same counts, which adds to the same averages."""
        other = DispatchCounter(self.num_experts, self.advice, self.averages)
        other.take(self)
        return other

    def take(self, other: DispatchCounter) -> None:
        """Have the counts of another counter in the place of one's own."""
        self.top_k = other.top_k
        self._sums = None if other._sums is None else (other._sums[0].clone(), other._sums[1].clone())

    def mass(self) -> torch.Tensor | None:
        """Summed gate weights, float64, (num_experts,), where they were counted; None before the first dispatch."""
        return None if self._sums is None else self._sums[1][:-1]

    def totals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts (int64) and mass (float64), each (num_experts,)."""
        if self._sums is None:
            return torch.zeros(self.num_experts, dtype=torch.int64), torch.zeros(self.num_experts, dtype=torch.float64)
        counts, mass = self._sums
        return counts[:-1].cpu(), mass[:-1].cpu()


# A family, the module at a layer's path, its parent, and what to call with (expert ids, expert weights).
Watched = tuple[MoEFamily, nn.Module, nn.Module, Callable[[torch.Tensor, torch.Tensor], None]]


@contextmanager
def watching(layers: Iterable[Watched]) -> Iterator[None]:
    """Report every dispatch of these layers during the block; the hooks are gone after it, also after an exception."""
    with ExitStack() as stack:
        for family, experts, parent, on_dispatch in layers:
            for handle in family.watch(experts, parent, on_dispatch):
                stack.callback(handle.remove)
        yield


def see_mask(
    counters: Mapping[str, DispatchCounter], in_decoder: Collection[str], batch: Mapping[str, Any], given: bool
) -> None:
    """Tell counters which tokens of the batch that a model is called with are no padding.

    Args:
        counters: by the path of their layer.
        in_decoder: paths of the layers that read what a decoder reads.
        batch: the call's keyword arguments.
        given: whether the user passed the batch: then one without a mask has no padding. Of what the model itself
            passes on, only masks of two dimensions are read: it makes those of four for attention, not to mark padding.
    """
    masks = [
        token_mask(mask, batch) if given or (isinstance(mask, torch.Tensor) and mask.dim() == 2) else None
        for mask in (batch.get("attention_mask"), decoder_mask(batch))
    ]
    for path, counter in counters.items():
        mask = masks[path in in_decoder]
        if mask is not None or given:
            counter.real = mask
