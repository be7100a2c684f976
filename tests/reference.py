"""Naive forwards, an expert at a time, that the fast paths are compared with. They share no code with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class NaiveAdapter:
    """Factors of one projection of one expert: A (rank, in), B (rank, out), and the scaling."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def naive_weight(experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """One projection's weight, (out, in), read straight from the layout that the decorator's flags describe."""
    if projection == "down_proj" or not experts.has_gate:
        weight = getattr(experts, projection)[expert]
        return weight.T if experts.is_transposed else weight
    weight = experts.gate_up_proj[expert]
    weight = weight.T if experts.is_transposed else weight
    width = weight.shape[0] // 2
    if experts.is_concatenated:
        return weight[:width] if projection == "gate_proj" else weight[width:]
    return weight[0::2] if projection == "gate_proj" else weight[1::2]


def naive_bias(experts: nn.Module, projection: str, expert: int) -> torch.Tensor | float:
    if not experts.has_bias:
        return 0.0
    if projection == "down_proj" or not experts.has_gate:
        return getattr(experts, f"{projection}_bias")[expert]
    bias = experts.gate_up_proj_bias[expert]
    width = bias.shape[0] // 2
    if experts.is_concatenated:
        return bias[:width] if projection == "gate_proj" else bias[width:]
    return bias[0::2] if projection == "gate_proj" else bias[1::2]


def naive_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    adapters: list[dict[tuple[str, int], NaiveAdapter]],
) -> torch.Tensor:
    """Every pair by itself: (tokens, hidden) -> (tokens, hidden).

    Args:
        adapters: per adapter, (projection, expert) -> factors.
    """

    def project(projection: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, naive_weight(experts, projection, expert)) + naive_bias(experts, projection, expert)
        for adapter in adapters:
            factors = adapter.get((projection, expert))
            if factors is not None:
                y = y + factors.scaling * ((x @ factors.a.T) @ factors.b)
        return y

    rows = []
    for token in range(hidden_states.shape[0]):
        total = torch.zeros_like(hidden_states[token])
        for pair in range(expert_ids.shape[1]):
            expert = int(expert_ids[token, pair])
            x = hidden_states[token]
            if experts.has_gate:
                gate, up = project("gate_proj", expert, x), project("up_proj", expert, x)
                parts = (gate, up) if experts.is_concatenated else (torch.stack((gate, up), -1).flatten(-2),)
                act = experts._apply_gate(torch.cat(parts, -1))
            else:
                act = experts.act_fn(project("up_proj", expert, x))
            y = project("down_proj", expert, act)
            if getattr(experts, "has_post_expert_norm", False):
                y = experts.post_expert_norm(y)
            total = total + y * expert_weights[token, pair]
        rows.append(total)
    return torch.stack(rows)


def assert_same(
    actual: torch.Tensor, expected: torch.Tensor, what: str, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """Close, of one shape, finite, and not trivially so: an expectation of zeros proves nothing.

    Args:
        rtol: relative to each element; atol: relative to the largest one.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    assert expected.abs().max() > 0, f"{what}: the reference is zero everywhere"
    atol = atol * float(expected.abs().max())
    assert torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=atol), (
        f"{what}: differs by {(actual.double() - expected.double()).abs().max():.3e}"
    )
