"""Experts as the paper's code has them: a list of gated MLPs of `nn.Linear`, run one after the other in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ExpertMLP(nn.Module):
    """One expert; its weights are views of the stacks, so that no memory is needed for a second copy.

    The names are not `gate_proj` and so on: PEFT takes those, in a model of this type, to mean the stacks.
    """

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act_fn: Any) -> None:
        super().__init__()
        self.w_gate, self.w_up, self.w_down = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_down(self.act_fn(self.w_gate(x)) * self.w_up(x))


class LoopedExperts(nn.ModuleList):
    """In place of a stack of experts, with its signature. The loop is that of transformers 4."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        out = torch.zeros_like(hidden_states)
        with torch.no_grad():
            mask = nn.functional.one_hot(top_k_index, num_classes=len(self)).permute(2, 1, 0)
            hit = (mask.sum(dim=(-1, -2)) > 0).nonzero().flatten().tolist()
        for expert in hit:
            position, token = torch.where(mask[expert])
            part = self[expert](hidden_states[token]) * top_k_weights[token, position, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def with_looped_experts(model: nn.Module) -> nn.Module:
    """The model, changed in place, with each stack of experts replaced by a list of the same experts."""
    blocks = [module for module in model.modules() if hasattr(getattr(module, "experts", None), "gate_up_proj")]
    for block in blocks:
        stack: Any = block.experts
        gate, up = stack.gate_up_proj.chunk(2, dim=1)
        parts = zip(gate, up, stack.down_proj, strict=True)
        block.experts = LoopedExperts([ExpertMLP(*weights, stack.act_fn) for weights in parts])
    return model


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
