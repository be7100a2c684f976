"""How expert weights are laid out and where the dispatch can be read: one `MoEFamily` per layout, in an open registry.

A family answers these questions about an experts module: what shapes it has, where the weights of one projection are,
how the model calls it, and what the router dispatched to it. What lies above (profiling, injection, exporting) speaks
only to families, and asks what they can do, never which they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# (expert ids, expert weights), both (tokens, top_k): called once a forward of the layer.
OnDispatch = Callable[[torch.Tensor, torch.Tensor], None]

# How a model calls its experts: each on its own rows; all at once, with tokens, expert ids and weights; or stack after
# stack, with rows sorted by expert.
Call = Literal["each_expert", "all_tokens", "sorted_rows"]


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
        call: how the model calls the experts, which says what adapter layer serves them: "each_expert" (set by
            `ModuleExperts`), "all_tokens" (set by `FusedExperts`) or "sorted_rows"; None: `layer_class` says it.
        layer_class: an adapter layer of your own, in the place of the one for `call`: a subclass of `SieveExpertLayer`,
            or where to import that from ("package.module:Class").
        in_stacks: the weights are 3-D parameters with a matrix for each expert, which plain LoRA adapts by their names
            (PEFT's `target_parameters`).
        dequantises: its stacks may be stored in fewer bits: it reads them with `plain_stack`.
    """

    name: str
    router_names: tuple[str, ...] = ("gate", "router")
    reads_router_weight: bool = False
    shared_experts: str = r"shared_(experts?|mlp)"
    adapted_child: str | None = None
    call: Call | None = None
    layer_class: str | type | None = None
    in_stacks: bool = False
    dequantises: bool = False

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

    def names(self, experts: nn.Module) -> dict[tuple[str, int], str]:
        """(projection, expert) -> name inside the experts module of the linear layer that holds that matrix.

        Empty where the weights are not those of linear layers.
        """
        return {}

    @abstractmethod
    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        """Register hooks that report every dispatch; returns their handles.

        `experts` is the module at the layer's path (an adapter layer, if one is around it), `parent` its parent.
        """


class ExpertsCall(NamedTuple):
    """One call of an experts module.

    Attributes:
        hidden_states: (tokens, hidden).
        expert_ids, expert_weights: (tokens, top_k).
    """

    hidden_states: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor


def bind_dispatch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall:
    """The three arguments of a fused experts call, however they are named."""
    # gpt_oss and openai_privacy_filter name them router_indices and routing_weights.
    names = (("hidden_states",), ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))
    values = list(args)
    for aliases in names[len(values) :]:
        values.append(next(kwargs[alias] for alias in aliases if alias in kwargs))
    return ExpertsCall(*values)
