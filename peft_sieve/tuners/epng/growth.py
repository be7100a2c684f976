"""New rows of A for an expert that grows, orthogonal to those that it has."""

from __future__ import annotations

import hashlib
import math

import torch


def orthogonal_rows(old: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random rows that are orthogonal to `old` and to each other, of the mean length of the old rows.

    Computed on the CPU in float64, so that they are the same wherever the model is.

    Args:
        old: (rank, in).
        count: how many; rank + count is at most in.

    Returns:
        (count, in), float64.
    """
    old = old.detach().to("cpu", torch.float64)
    basis = torch.linalg.qr(old.T).Q  # (in, rank)
    fresh = torch.randn(old.shape[1], count, generator=generator, dtype=torch.float64)
    # Twice: what rounding leaves of the old directions after the first time is gone after the second.
    for _ in range(2):
        fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh)).Q
    length = old.norm(dim=1).mean().item()
    # That of a row as it is initialised, should all be zeros.
    return fresh.T * (length or 1 / math.sqrt(3))


def generator_for(*what: object) -> torch.Generator:
    """Random numbers for what these values name: a resumed run draws the same, and nobody else's numbers change."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
