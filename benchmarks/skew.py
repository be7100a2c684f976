"""Skewed routing for random weights.

A fresh router spreads tokens almost evenly; a trained one does not: on GSM8K, the hottest quarter of OLMoE's experts
receives 57% of a layer's tokens (MoE-Sieve). The cost of adapting the hot experts depends on that share, so random
models are given it: all embeddings have one direction in common, which survives the norms, and each router has offsets
along it, of other experts in each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

COVERAGE = 0.57
HOT = 0.25


@torch.no_grad()
def skew_routing(model: PreTrainedModel, batch: dict[str, torch.Tensor], seed: int = 0) -> None:
    """Set embeddings and routers so that each layer's hottest quarter of experts receives 57% of the batch."""
    embeddings = model.get_input_embeddings().weight
    # As large as what is added to them in all layers, so that the common direction is there in the last one, too.
    embeddings.normal_(std=1.0)
    embeddings.add_(torch.randn_like(embeddings[0]))
    generator = torch.Generator().manual_seed(seed)

    def set_router(router: nn.Module, args: tuple[Any, ...]) -> None:
        # Before its forward, so that the layers after it see states routed as they will be.
        states = args[0].reshape(-1, args[0].shape[-1]).float()  # (tokens, hidden)
        offsets = torch.randn(router.weight.shape[0], generator=generator).to(states.device)
        router.weight.copy_(_skewed(router.weight.float(), states, offsets, model.config.num_experts_per_tok))

    routers = [module.gate for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]
    hooks = [router.register_forward_pre_hook(set_router) for router in routers]
    training = model.training
    try:
        model.eval()
        model.base_model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _skewed(weight: torch.Tensor, states: torch.Tensor, offsets: torch.Tensor, top_k: int) -> torch.Tensor:
    """A router's weight with as much of `offsets` (num_experts,) along the mean state as the coverage wants."""
    mean = states.mean(0)
    along = mean / mean.square().sum()  # states @ along is 1 on average
    weight = weight - torch.outer(weight @ mean, along)
    logits, strength = states @ weight.T, (states @ along)[:, None]
    low, high = 0.0, 16.0 * float(logits.std())
    for _ in range(20):
        middle = (low + high) / 2
        enough = coverage(logits + middle * strength * offsets, top_k) >= COVERAGE
        low, high = (low, middle) if enough else (middle, high)
    return weight + torch.outer(high * offsets, along)


def coverage(logits: torch.Tensor, top_k: int) -> float:
    """Share of the dispatched pairs that the hottest quarter of experts receives; logits (tokens, num_experts)."""
    counts = torch.bincount(logits.topk(top_k, dim=-1).indices.flatten(), minlength=logits.shape[1])
    hot = counts.sort(descending=True).values[: max(1, round(HOT * logits.shape[1]))]
    return float(hot.sum() / counts.sum())
