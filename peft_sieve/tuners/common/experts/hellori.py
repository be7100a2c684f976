"""HELLoRI (arXiv 2605.18795): the fixed random share of an expert adapter's B that is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def random_share(
    owners: Sequence[int | str], shape: tuple[int, int], density: float, *, seed: int, name: str
) -> torch.Tensor:
    """Which entries are trained: bool, (owners, *shape), the same number for each owner.

    It is not saved: it follows from the arguments. What an expert gets depends on the others in no way.

    Args:
        owners: ids of experts, or a name for those that use one factor together.
        shape: of one expert's factor.
        density: share of the entries, in (0, 1]; at least one entry.
        name: of the factor, with the path of its layer.
    """
    size = shape[0] * shape[1]
    count = max(1, round(density * size))
    shares = torch.zeros(len(owners), size, dtype=torch.bool, device="cpu")
    for slot, owner in enumerate(owners):
        digest = hashlib.sha256(f"{seed}:{name}:{owner}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        shares[slot, torch.randperm(size, generator=generator, device="cpu")[:count]] = True
    return shares.view(len(owners), *shape)
