"""What lies between the two products of an expert, by its model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from ...kernels.activation import Function, Replayer, replay, replay_silu_gate


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
