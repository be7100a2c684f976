"""What lies between an expert's two products, and its gradient from its input alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

# Rows and the map from the gradient of the result to that of the input.
Replay = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]
Function = Callable[[torch.Tensor], torch.Tensor]
Replayer = Callable[[torch.Tensor], Replay]


def replay(function: Function, x: torch.Tensor) -> Replay:
    """`function(x)` once more, and its backward."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result = function(leaf)
    return result.detach(), lambda grad: torch.autograd.grad(result, leaf, grad.to(result.dtype))[0]


def replay_silu_gate(gate_up: torch.Tensor) -> Replay:
    """`replay` for silu(gate) * up, gate and up side by side, without autograd's copies."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)

    def backward(grad: torch.Tensor) -> torch.Tensor:
        grad_both = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_both

    return silu * up, backward


def activation_of(experts: Any) -> tuple[Function, Replayer]:
    """The activation of a module of fused experts, and how to replay it."""
    if not experts.has_gate:
        return experts.act_fn, partial(replay, experts.act_fn)
    # The default of the common interface; some models have a gate of their own.
    if type(experts)._apply_gate.__module__ == "transformers.integrations.moe":
        return gate_by(experts.act_fn)
    return experts._apply_gate, partial(replay, experts._apply_gate)


def gate_by(act_fn: Function) -> tuple[Function, Replayer]:
    """act_fn(gate) * up of gate and up side by side, and how to replay it."""

    def function(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act_fn(gate) * up

    if isinstance(act_fn, nn.SiLU | SiLUActivation):
        return function, replay_silu_gate
    return function, partial(replay, function)
