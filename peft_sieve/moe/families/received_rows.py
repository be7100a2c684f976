"""Which token each row that an expert received is a copy of.

Where a block picks the experts in its own forward, nothing outside sees the choice; but every row that it gives an
expert is a copy of a row that the router read. Equal rows are routed alike, so they need not be told apart.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS_AT_ONCE = 1024  # the products below are eight bytes an element


def row_keys(rows: torch.Tensor) -> torch.Tensor:
    """A number for each row that depends on every bit of it: (..., features) -> (rows,), int64."""
    bits = rows.detach().reshape(-1, rows.shape[-1]).contiguous().view(_INTEGERS[rows.dtype.itemsize])
    factors = _factors(bits.shape[-1], bits.device)
    return torch.cat([(piece * factors).sum(-1) for piece in bits.split(_ROWS_AT_ONCE)])


@lru_cache(maxsize=8)
def _factors(features: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (features,), generator=generator).to(device)


def dispatch_of(token_keys: torch.Tensor, received: dict[int, torch.Tensor], num_experts: int) -> torch.Tensor | None:
    """The dispatch behind the rows that the experts received.

    Args:
        token_keys: of the rows that the router read, (tokens,).
        received: expert -> keys of its rows, (rows,).

    Returns:
        Expert ids, (tokens, top_k), ascending in a row; `num_experts` where a token went to fewer experts than others.
        None if a row is no token's.
    """
    sorted_keys, order = token_keys.sort(stable=True)
    tokens, experts = [order[:0]], [order[:0]]
    for expert in sorted(received):
        keys = received[expert].to(token_keys.device).sort().values
        first = torch.searchsorted(sorted_keys, keys)
        equal = torch.searchsorted(sorted_keys, keys, right=True) - first
        if (equal == 0).any():
            return None
        # The n-th of several equal rows is taken for the n-th of the equal tokens.
        occurrence = torch.arange(keys.numel(), device=keys.device) - torch.searchsorted(keys, keys)
        tokens.append(order[first + occurrence % equal])
        experts.append(torch.full_like(keys, expert))
    by_token, sorting = torch.cat(tokens).sort(stable=True)
    slots = torch.arange(by_token.numel(), device=by_token.device) - torch.searchsorted(by_token, by_token)
    top_k = int(slots.max()) + 1 if slots.numel() else 0
    ids = token_keys.new_full((token_keys.numel(), top_k), num_experts)
    ids[by_token, slots] = torch.cat(experts)[sorting]
    return ids
