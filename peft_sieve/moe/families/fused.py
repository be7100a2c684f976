"""Fused experts: 3-D parameters, a matrix for each expert, that one call takes all tokens through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...kernels.stacks import ExpertStacks
from ..storage import plain_stack
from .family import PROJECTIONS, ExpertsCall, ExpertsShape, MoEFamily, OnDispatch, bind_dispatch
from .gates import activation_of


class FusedExperts(MoEFamily):
    """The common interface of transformers (`use_experts_implementation`): 3-D parameters, called as
    `experts(hidden_states, top_k_index, top_k_weights)`."""

    name = "fused"
    call = "all_tokens"
    in_stacks = True
    dequantises = True

    def matches(self, module: nn.Module) -> bool:
        first = getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", None)
        flags = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
        return (
            _is_stack(first)
            and _is_stack(getattr(module, "down_proj", None))
            and all(hasattr(module, f) for f in flags)
        )

    def shape(self, experts: nn.Module) -> ExpertsShape:
        # From the shapes alone: a quantised stack may have no transpose.
        num_experts, hidden_size, width = self._matrix_shape(experts, _first_name(experts))
        first = (hidden_size, width // 2 if experts.has_gate else width)
        down = self._matrix_shape(experts, "down_proj")[1:]
        names = self._names(experts)
        return ExpertsShape(num_experts, {name: down if name == "down_proj" else first for name in names})

    def _matrix_shape(self, experts: nn.Module, name: str) -> tuple[int, int, int]:
        """(num_experts, in_features, out_features) of a stack."""
        num_experts, rows, columns = getattr(experts, name).shape
        return (num_experts, rows, columns) if experts.is_transposed else (num_experts, columns, rows)

    def expert_weight(self, experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
        return self._stack(experts, projection)[expert]

    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        fused = experts.has_gate
        return sorted({"gate_up_proj" if fused and p != "down_proj" else p for p in projections})

    def stacks(self, experts: Any, dtype: torch.dtype) -> ExpertStacks:
        """What its forward computes with: views, or copies of what is stored in fewer bits.

        Args:
            dtype: of copies whose stored form does not say what they were made from.
        """
        name = _first_name(experts)
        first, down = (plain_stack(experts, stack, dtype) for stack in (name, "down_proj"))
        if not experts.is_transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        activation, replay_activation = activation_of(experts)
        return ExpertStacks(
            first=[first],
            down=down,
            columns={name: self._columns(experts, name, first.shape[2]) for name in self._names(experts)},
            activation=activation,
            replay_activation=replay_activation,
            first_bias=getattr(experts, f"{name}_bias").detach() if experts.has_bias else None,
            down_bias=experts.down_proj_bias.detach() if experts.has_bias else None,
            post_norm=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
            one_by_one=getattr(getattr(experts, "config", None), "_experts_implementation", None) == "eager",
        )

    def bind(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall:
        """The arguments of a call of the experts module."""
        return bind_dispatch(args, kwargs)

    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, expert_ids, expert_weights = bind_dispatch(args, kwargs)
            on_dispatch(expert_ids, expert_weights)

        return [experts.register_forward_pre_hook(hook, with_kwargs=True)]

    def _names(self, experts: Any) -> tuple[str, ...]:
        return PROJECTIONS if experts.has_gate else PROJECTIONS[1:]

    def _columns(self, experts: Any, projection: str, width: int) -> slice:
        """Where the output of a projection lies in that of its stack, which is `width` wide."""
        if not experts.has_gate or projection == "down_proj":
            return slice(None)
        second = projection == "up_proj"
        if not experts.is_concatenated:
            return slice(int(second), None, 2)
        return slice(width // 2, None) if second else slice(width // 2)

    def _stack(self, experts: Any, projection: str) -> torch.Tensor:
        """All experts' weights of a projection: a view of shape (num_experts, out_features, in_features)."""
        stack = getattr(experts, projection if projection == "down_proj" else _first_name(experts)).detach()
        by_output = stack.transpose(1, 2) if experts.is_transposed else stack
        return by_output[:, self._columns(experts, projection, by_output.shape[1])]


def _first_name(experts: Any) -> str:
    """The stack that reads the layer's input."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _is_stack(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3
