"""Weighted sums of low-rank factors: the arithmetic of `add_weighted_adapter`, for one matrix or a stack of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COMBINATION_TYPES = ("svd", "linear", "cat")


@dataclass(frozen=True)
class Share:
    """What one adapter brings to a sum: coefficient * B^T A.

    Attributes:
        a: (..., rank, in).
        b: (..., rank, out).
        coefficient: the adapter's weight times its scaling.
    """

    a: torch.Tensor
    b: torch.Tensor
    coefficient: float


def combined_rank(combination_type: str, ranks: Sequence[int]) -> int:
    """The rank that a sum of adapters of these ranks needs: `cat` lays them side by side."""
    return sum(ranks) if combination_type == "cat" else max(ranks)


def combine(combination_type: str, shares: Sequence[Share], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a sum, with zeros up to `rank`: A (..., rank, in) and B (..., rank, out), in float32 or wider.

    Args:
        combination_type: "cat" keeps the sum of products exactly; "svd" is the closest one of this rank, and exact
            where the sum has no higher one; "linear" adds up A and B by themselves, as in PEFT, which is the sum of
            products only where one share is all there is.
        shares: one or more, of one shape but for the rank; of one rank for "linear".
        rank: `combined_rank` or more, any for "svd".
    """
    dtype = _wide(shares[0].a)
    factors = [(share.a.detach().to(dtype), share.b.detach().to(dtype), share.coefficient) for share in shares]
    if combination_type == "linear":
        # The root on both sides, the sign on one.
        roots = [math.sqrt(abs(coefficient)) for _, _, coefficient in factors]
        signs = [math.copysign(1, coefficient) for _, _, coefficient in factors]
        a = sum(f[0] * root * sign for f, root, sign in zip(factors, roots, signs, strict=True))
        b = sum(f[1] * root for f, root in zip(factors, roots, strict=True))
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    else:
        a = torch.cat([f[0] * f[2] for f in factors], dim=-2)
        b = torch.cat([f[1] for f in factors], dim=-2)
        if combination_type == "svd":
            a, b = _truncated(a, b, rank)
    return _padded_to(a, rank), _padded_to(b, rank)


def combine_stacked(
    combination_type: str, shares: Sequence[Share], rank: int, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `combine`, for matrices that have one of the two factors in common, and in the sum, too.

    So they are parts of one matrix, and "svd" is the closest to all of them together.

    Args:
        shares: of one factor (matrices, rank, features), and of the other (1, rank, features).
        counts: how many times each matrix counts for "svd".
    """
    roots = torch.tensor(counts, dtype=torch.float64).sqrt().view(-1, 1, 1)
    scale = roots if combination_type == "svd" else torch.ones_like(roots)

    def joined(factor: torch.Tensor) -> torch.Tensor:
        """(matrices, rank, features) -> (1, rank, matrices * features)"""
        if len(factor) < len(counts):
            return factor
        return (factor.detach() * scale.to(factor.device, _wide(factor))).transpose(0, 1).flatten(1).unsqueeze(0)

    def parted(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if len(like) < len(counts):
            return factor
        return factor.squeeze(0).unflatten(1, (len(counts), -1)).transpose(0, 1) / scale.to(factor.device, factor.dtype)

    whole = [Share(joined(share.a), joined(share.b), share.coefficient) for share in shares]
    a, b = combine(combination_type, whole, rank)
    return parted(a, shares[0].a), parted(b, shares[0].b)


def _truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of B^T A of this rank, without ever building it: its core between two bases is small."""
    basis_in, core_in = torch.linalg.qr(a.transpose(-1, -2))  # (..., in, k), (..., k, ranks)
    basis_out, core_out = torch.linalg.qr(b.transpose(-1, -2))
    u, s, vh = torch.linalg.svd(core_out @ core_in.transpose(-1, -2), full_matrices=False)
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    return vh @ basis_in.transpose(-1, -2), (basis_out @ (u * s.unsqueeze(-2))).transpose(-1, -2)


def _wide(factor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(factor.dtype, torch.float32)


def _padded_to(factor: torch.Tensor, rank: int) -> torch.Tensor:
    missing = rank - factor.shape[-2]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing)) if missing else factor
