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

from .linear import is_linear

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
    """A layout of routed experts."""

    name: str

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` holds routed experts in this layout."""

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

        `experts` is the module that the model calls (an adapter layer, if one is around it), `parent` its parent.
        """


class FusedExperts(MoEFamily):
    """The common interface of transformers (`use_experts_implementation`): 3-D parameters, called as
    `experts(hidden_states, top_k_index, top_k_weights)`."""

    name = "fused"

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
        fused = experts.has_gate
        num_experts, hidden_size, width = self._matrix_shape(experts, "gate_up_proj" if fused else "up_proj")
        first = (hidden_size, width // 2 if fused else width)
        down = self._matrix_shape(experts, "down_proj")[1:]
        names = PROJECTIONS if fused else PROJECTIONS[1:]
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

    def _stack(self, experts: nn.Module, projection: str) -> torch.Tensor:
        """All experts' weights of a projection: a view of shape (num_experts, out_features, in_features)."""
        fused = experts.has_gate and projection != "down_proj"
        weight = getattr(experts, "gate_up_proj" if fused else projection).data
        if experts.is_transposed:
            weight = weight.transpose(1, 2)
        if not fused:
            return weight
        second = projection == "up_proj"
        if experts.is_concatenated:
            return weight.chunk(2, dim=1)[second]
        return weight[:, second::2]

    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, expert_ids, expert_weights = bind_dispatch(args, kwargs)
            on_dispatch(expert_ids, expert_weights)

        return [experts.register_forward_pre_hook(hook, with_kwargs=True)]


def bind_dispatch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three arguments of a fused experts call, however they are named.

    Returns:
        hidden states (tokens, hidden), expert ids and expert weights (tokens, top_k).
    """
    # gpt_oss and openai_privacy_filter name them router_indices and routing_weights.
    names = (("hidden_states",), ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))
    values = list(args)
    for aliases in names[len(values) :]:
        values.append(next(kwargs[alias] for alias in aliases if alias in kwargs))
    hidden_states, expert_ids, expert_weights = values
    return hidden_states, expert_ids, expert_weights


class ModuleListExperts(MoEFamily):
    """A `ModuleList` of small gated MLPs beside a router that returns (ids, weights, ...): the shape of
    DeepSeek-MoE-16B's remote code."""

    name = "module_list"

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            return False
        return all(is_linear(getattr(m, p, None)) for m in module for p in ("up_proj", "down_proj"))

    def shape(self, experts: nn.Module) -> ExpertsShape:
        assert isinstance(experts, nn.ModuleList)
        linears: dict[str, Any] = {name: getattr(experts[0], name, None) for name in PROJECTIONS}
        sizes = {n: (m.in_features, m.out_features) for n, m in linears.items() if is_linear(m)}
        return ExpertsShape(len(experts), sizes)

    def expert_weight(self, experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
        assert isinstance(experts, nn.ModuleList)
        return getattr(experts[expert], projection).weight.data

    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        return [f"*.{projection}.weight" for projection in projections]

    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        router = next((getattr(parent, name) for name in ROUTER_NAMES if hasattr(parent, name)), None)
        if router is None:
            return []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            ids, weights = _ids_and_weights(output)
            if ids is not None and weights is not None:
                on_dispatch(ids, weights)

        return [router.register_forward_hook(hook)]


def _ids_and_weights(output: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """From what a router returned: the integer tensor of expert ids, and the float tensor of the same shape."""
    tensors = [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, torch.Tensor)]
    ids = next((t for t in tensors if not t.is_floating_point() and t.dim() >= 2), None)
    if ids is None:
        return None, None
    weights = next((t for t in tensors if t.is_floating_point() and t.numel() == ids.numel()), None)
    if weights is None:
        return None, None
    return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1])


# Every model that follows the common interface, and the remote code seen so far, names its router one of these.
ROUTER_NAMES = ("gate", "router")

_FAMILIES: list[MoEFamily] = [FusedExperts(), ModuleListExperts()]


def register_moe_family(family: MoEFamily) -> None:
    """Teach the package another layout of routed experts. Families registered later are asked first."""
    _FAMILIES.insert(0, family)


def family_of(module: nn.Module) -> MoEFamily | None:
    """The family that `module` belongs to, if it holds routed experts."""
    return next((family for family in _FAMILIES if family.matches(module)), None)


def _is_stack(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3
