"""Dropout by position: which elements are zeroed follows from a seed, and no mask of the matrix's size is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """Which elements of a matrix are zeroed.

    Attributes:
        p: probability of zero, in (0, 1).
        seed: non-negative, below 2**63; equal seeds give equal masks.
    """

    p: float
    seed: int

    @property
    def scale(self) -> float:
        """What keeps the expectation: the factor on the elements that stay."""
        return 1 / (1 - self.p)


def dropped_positions(dropout: Dropout, stream: int, count: int) -> Tensor:
    """Which of `count` elements are zeroed, each with probability p by itself: ascending, int64.

    The gaps between them are drawn, which are geometric: for the usual small p far fewer numbers than elements.

    Args:
        stream: non-negative; different streams of one seed are independent.
    """
    generator = np.random.Generator(np.random.SFC64((dropout.seed, stream)))
    # The integer part of an exponential variable is geometric.
    rate = 1 / -math.log1p(-dropout.p)
    found = [np.empty(0, dtype=np.int64)]
    last = -1
    while last < count - 1:
        expected = (count - 1 - last) * dropout.p
        size = int(expected + 4 * math.sqrt(expected)) + 8
        gaps = (generator.standard_exponential(size, dtype=np.float32) * np.float32(rate)).astype(np.int64) + 1
        found.append(np.cumsum(gaps) + last)
        last = int(found[-1][-1])
    positions = np.concatenate(found) if len(found) > 2 else found[-1]
    return torch.from_numpy(positions[: np.searchsorted(positions, count)])


def drop(dropout: Dropout | None, x: Tensor) -> Tensor:
    """A matrix with the elements zeroed that its mask leaves out, not scaled; for one seed always the same elements."""
    if dropout is None:
        return x
    if x.device.type == "cpu":
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1).index_fill_(0, dropped_positions(dropout, 0, x.numel()), 0)
        return x
    generator = torch.Generator(x.device).manual_seed(dropout.seed)
    return x * (torch.rand(x.shape, generator=generator, device=x.device) >= dropout.p)
