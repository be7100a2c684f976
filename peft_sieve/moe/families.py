"""How expert weights are laid out and where the dispatch can be read: one `MoEFamily` per layout, in an open registry.

A family answers three questions about an experts module: what shapes it has, where the weights of one projection
are, and what the router dispatched to it. What lies above (profiling, injection, merging) speaks only to families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SieveError
from .activation import activation_of
from .quantised import plain_stack
from .stacks import ExpertsCall, ExpertStacks

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# (expert ids, expert weights), both (tokens, top_k): called once a forward of the layer.
OnDispatch = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class ExpertsShape:
    """Shapes of one experts module.

    Attributes:
        num_experts: routed experts.
        projections: name -> (in_features, out_features), a subset of `PROJECTIONS`, in that order.
    """

    num_experts: int
    projections: dict[str, tuple[int, int]]

    @property
    def hidden_size(self) -> int:
        """Width of what goes into an expert."""
        return self.projections["up_proj"][0]

    @property
    def intermediate_size(self) -> int:
        """Width inside an expert."""
        return self.projections["down_proj"][0]


class MoEFamily(ABC):
    """A layout of routed experts.

    Attributes:
        name: what to call it in messages.
        router_names: what the router may be called inside the block that holds the experts module.
        reads_router_weight: the router is a linear layer that is never called: the model multiplies by its weight.
        shared_experts: pattern of the names of shared experts in that block.
        adapted_child: child of the experts module in whose place the adapter layer stands, where router and experts are
            in one module (the layer's path is then the child's); None: in the place of the experts module.
        layer_class: the adapter layer that serves it, a subclass of `SieveExpertLayer`, or where to import that from
            ("package.module:Class").
        dequantises: its stacks may be stored in fewer bits: it reads them with `plain_stack`.
    """

    name: str
    router_names: tuple[str, ...] = ("gate", "router")
    reads_router_weight: bool = False
    shared_experts: str = r"shared_(experts?|mlp)"
    adapted_child: str | None = None
    dequantises: bool = False
    layer_class: str | type

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` holds routed experts in this layout."""

    def is_block(self, parent: nn.Module) -> bool:
        """Whether `parent`, which holds a module that matches, routes to it; a list of dense MLPs has no router."""
        return True

    @abstractmethod
    def shape(self, experts: nn.Module) -> ExpertsShape:
        """Number of experts and widths."""

    @abstractmethod
    def expert_weight(self, experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
        """The weight of one projection of one expert as a view of shape (out_features, in_features)."""

    @abstractmethod
    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        """What the parameters behind `projections` are called inside the experts module."""

    @abstractmethod
    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        """Register hooks that report every dispatch; returns their handles.

        `experts` is the module at the layer's path (an adapter layer, if one is around it), `parent` its parent.
        """


class FusedExperts(MoEFamily):
    """The common interface of transformers (`use_experts_implementation`): 3-D parameters, called as
    `experts(hidden_states, top_k_index, top_k_weights)`."""

    name = "fused"
    dequantises = True
    layer_class = "peft_sieve.tuners.sieve.fused:FusedSieveExperts"

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


def bind_dispatch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall:
    """The three arguments of a fused experts call, however they are named."""
    # gpt_oss and openai_privacy_filter name them router_indices and routing_weights.
    names = (("hidden_states",), ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))
    values = list(args)
    for aliases in names[len(values) :]:
        values.append(next(kwargs[alias] for alias in aliases if alias in kwargs))
    return ExpertsCall(*values)


_FAMILIES: list[MoEFamily] = []


def register_moe_family(family: MoEFamily) -> None:
    """Teach the package another layout of routed experts (docs/custom-architectures.md).

    Families registered later are asked first.

    Raises:
        SieveError: `family` is not an instance of `MoEFamily`.
    """
    if not isinstance(family, MoEFamily):
        raise SieveError(
            f"register_moe_family received {family!r}, expected an instance of a class derived from MoEFamily: pass "
            "one, such as ModuleExperts('mine', up_proj='fc_in', down_proj='fc_out')"
        )
    _FAMILIES.insert(0, family)


def family_of(module: nn.Module) -> MoEFamily | None:
    """The family that `module` belongs to, if it holds routed experts."""
    return next((family for family in _FAMILIES if family.matches(module)), None)


def _is_stack(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3
