"""What the adapters of a block add, computed as one wide product: no token is moved.

The factors of all adapters lie side by side, and a gate for each token and adapter (zero where it was not sent) stands
between the two products. That takes num_adapters / num_adapters_per_tok times the arithmetic of sorting tokens by
adapter, and none of the memory: the inner tensor has num_adapters * r columns, where sorted tokens are copied whole,
once for each adapter that they go to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def mixture(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    gates: torch.Tensor | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The sum over adapters i of gates[:, i] * second[i]^T activation(first[i] x).

    Args:
        x: (tokens, width).
        first, second: (adapters, r, width), both.
        gates: (tokens, adapters); None for ones.
        activation: elementwise; None for none.

    Returns:
        (tokens, width)
    """
    inner = F.linear(x, first.flatten(0, 1))  # (tokens, adapters * r)
    if activation is not None:
        inner = activation(inner)
    if gates is not None:
        by_adapter = inner.unflatten(-1, first.shape[:2])  # (tokens, adapters, r)
        inner = (by_adapter * gates.to(inner.dtype).unsqueeze(-1)).flatten(-2)
    return inner @ second.flatten(0, 1).to(inner.dtype)


def routed_gates(logits: torch.Tensor, top_k: int, normalized: bool) -> torch.Tensor:
    """Softmax over the adapters, in float32 or wider, of which each token keeps the `top_k` largest.

    Args:
        logits: (tokens, adapters).
        normalized: whether those kept are made to sum to 1.

    Returns:
        (tokens, adapters), zeros elsewhere.
    """
    probabilities = wide_softmax(logits)
    kept, chosen = probabilities.topk(top_k, dim=-1)
    if normalized:
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, chosen, kept)


def dispatched_gates(
    expert_ids: torch.Tensor, expert_weights: torch.Tensor, slots: torch.Tensor, num_adapters: int
) -> torch.Tensor:
    """The weights that a router gave to the experts that have an adapter.

    Args:
        expert_ids, expert_weights: (tokens, top_k), as dispatched; ids from num_experts on are no expert's.
        slots: (num_experts,), the place of an expert's adapter, -1 if it has none.
        num_adapters: how many experts have one.

    Returns:
        (tokens, adapters)
    """
    # One more place than adapters, for what goes to none.
    extended = torch.cat((slots, slots.new_full((1,), -1))).long()
    places = extended[expert_ids.long().clamp(max=slots.shape[0])]
    places = places.masked_fill(places < 0, num_adapters)
    gates = expert_weights.new_zeros(expert_ids.shape[0], num_adapters + 1)
    return gates.scatter_add(-1, places, expert_weights)[:, :num_adapters]


def wide_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float32, or in float64 where the logits are."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
