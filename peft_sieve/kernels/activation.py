"""An activation run again, with the map from the gradient of its result to that of its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows and the map from the gradient of the result to that of the input.
Replay = tuple[Tensor, Callable[[Tensor], Tensor]]
Function = Callable[[Tensor], Tensor]
Replayer = Callable[[Tensor], Replay]


def replay(function: Function, x: Tensor) -> Replay:
    """`function(x)` once more, and its backward."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result = function(leaf)
    return result.detach(), lambda grad: torch.autograd.grad(result, leaf, grad.to(result.dtype))[0]


def replay_silu_gate(gate_up: Tensor) -> Replay:
    """`replay` for silu(gate) * up, gate and up side by side, without autograd's copies."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)

    def backward(grad: Tensor) -> Tensor:
        grad_both = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_both

    return silu * up, backward
