"""Experts that are modules of their own: small MLPs of linear layers, in a `ModuleList` or `ModuleDict`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import SieveError
from ..linear import is_linear
from .family import PROJECTIONS, ExpertsShape, MoEFamily, OnDispatch, bind_dispatch
from .received_rows import dispatch_of, row_keys


class ModuleExperts(MoEFamily):
    """A `ModuleList` or `ModuleDict` of experts, each called on the rows routed to it.

    The dispatch is read from the first of these that there is:

    1. the arguments of the container, if it has a forward of its own (`read_call`);
    2. what the router returns, if that holds expert ids and their weights (`read_router`);
    3. the rows that each expert received. The weights then come from the router's logits (`weights_of_logits`); without
       logits, every pair counts as 1, and a warning says so.

    Args:
        name: what to call the family.
        up_proj: name of that linear layer in an expert.
        down_proj: the same.
        gate_proj: the same; None without a gate. An expert that lacks its gate is taken as one without.
        normalized: whether the weights of a token's experts sum to 1, for (3). None: as `norm_topk_prob` of the block
            says, and if it has none, they do not.
    """

    call = "each_expert"

    def __init__(
        self,
        name: str,
        *,
        up_proj: str,
        down_proj: str,
        gate_proj: str | None = None,
        normalized: bool | None = None,
    ) -> None:
        self.name = name
        names = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
        self.linear_names = {projection: names[projection] for projection in PROJECTIONS if names[projection]}
        self.normalized = normalized

    # Weights

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return False
        experts = self.experts(module)
        others = [child for child in module.children() if not any(child is expert for expert in experts)]
        return len(experts) > 1 and not any(True for other in others for _ in other.parameters())

    def is_block(self, parent: nn.Module) -> bool:
        return any(hasattr(parent, name) for name in self.router_names)

    def experts(self, container: nn.Module) -> list[nn.Module]:
        """The experts in a container, by id."""
        return [child for child in container.children() if self._is_expert(child)]

    def _is_expert(self, module: nn.Module) -> bool:
        linears = dict(self._linears(module))
        if not {"up_proj", "down_proj"} <= set(linears):
            return False
        # A whole transformer block, too, may hold its MLP's layers directly.
        return sum(is_linear(inner) for inner in module.modules()) == len(linears)

    def _linears(self, expert: nn.Module) -> Iterator[tuple[str, Any]]:
        for projection, name in self.linear_names.items():
            linear = getattr(expert, str(name), None)
            if is_linear(linear):
                yield projection, linear

    def linear(self, container: nn.Module, projection: str, expert: int) -> Any:
        """The linear layer of one projection of one expert."""
        return getattr(self.experts(container)[expert], str(self.linear_names[projection]))

    def names(self, experts: nn.Module) -> dict[tuple[str, int], str]:
        named = [(name, child) for name, child in experts.named_children() if self._is_expert(child)]
        return {
            (projection, i): f"{name}.{self.linear_names[projection]}"
            for i, (name, expert) in enumerate(named)
            for projection, _ in self._linears(expert)
        }

    def shape(self, experts: nn.Module) -> ExpertsShape:
        modules = self.experts(experts)
        sizes = {name: (linear.in_features, linear.out_features) for name, linear in self._linears(modules[0])}
        return ExpertsShape(len(modules), sizes)

    def expert_weight(self, experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
        return self.linear(experts, projection, expert).weight.data

    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        return [f"*.{self.linear_names[projection]}.weight" for projection in projections]

    # Dispatch

    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        container = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
        if type(container).forward is nn.Module.forward:
            return _BlockWatcher(self, self.experts(container), parent, on_dispatch).handles

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_dispatch(*self.read_call(args, kwargs))

        return [container.register_forward_pre_hook(hook, with_kwargs=True)]

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids and weights, (tokens, top_k), from the arguments of the container's own forward."""
        _, expert_ids, expert_weights = bind_dispatch(args, kwargs)
        return expert_ids, expert_weights

    def read_router(self, output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Expert ids and weights, (tokens, top_k), from what the router returned; None if they are not in there.

        Taken for ids is the first tensor of integers, and for weights a tensor of floats with as many elements.
        """
        tensors = _tensors(output)
        ids = next((t for t in tensors if not t.is_floating_point() and t.dim() >= 2), None)
        if ids is None:
            return None
        weights = next((t for t in tensors if t.is_floating_point() and t.numel() == ids.numel()), None)
        return None if weights is None else (ids.flatten(0, -2), weights.reshape(-1, ids.shape[-1]))

    def weights_of_logits(self, logits: torch.Tensor, expert_ids: torch.Tensor, block: nn.Module) -> torch.Tensor:
        """Weights of the experts that a block picked, if they follow from the router's logits by softmax.

        Args:
            logits: (tokens, num_experts).
            expert_ids: (tokens, top_k); `num_experts` in empty slots.
            block: the module that picked.

        Returns:
            (tokens, top_k); whatever in empty slots.
        """
        empty = expert_ids == logits.shape[-1]
        weights = logits.float().softmax(-1).gather(-1, expert_ids.masked_fill(empty, 0)).masked_fill(empty, 0)
        normalized = getattr(block, "norm_topk_prob", False) if self.normalized is None else self.normalized
        return weights / weights.sum(-1, keepdim=True) if normalized else weights


class _BlockWatcher:
    """Hooks on a block, its router and its experts, for one layer of experts whose container is never called."""

    def __init__(
        self, family: ModuleExperts, experts: list[nn.Module], block: nn.Module, on_dispatch: OnDispatch
    ) -> None:
        self.family, self.block, self.on_dispatch = family, block, on_dispatch
        self.num_experts = len(experts)
        self._begin()
        router = next(getattr(block, name) for name in family.router_names if hasattr(block, name))
        self.handles: list[Any] = [
            router.register_forward_hook(self._router_done, with_kwargs=True),
            block.register_forward_hook(self._block_done),
        ]
        for index, expert in enumerate(experts):
            self.handles.append(expert.register_forward_pre_hook(partial(self._expert_called, index), with_kwargs=True))

    def _begin(self) -> None:
        self.reported = False
        self.read: torch.Tensor | None = None  # what the router was called on
        self.logits: torch.Tensor | None = None
        self.received: dict[int, torch.Tensor] = {}
        self.dtype: torch.dtype | None = None

    def _router_done(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._begin()
        routed = self.family.read_router(output)
        if routed is not None:
            self.reported = True
            self.on_dispatch(*routed)
            return
        self.read = next(iter(_floats(args, kwargs)), None)
        logits = [t for t in _tensors(output) if t.is_floating_point() and t.shape[-1:] == (self.num_experts,)]
        self.logits = logits[0].flatten(0, -2) if logits else None

    def _expert_called(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.reported:
            rows = _floats(args, kwargs)[0]
            self.dtype = rows.dtype
            keys = row_keys(rows)
            before = self.received.get(index)
            self.received[index] = keys if before is None else torch.cat((before, keys))

    def _block_done(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.received:
            self._report_rows()
        self._begin()

    def _report_rows(self) -> None:
        # A router may read the hidden states in float32; casting back gives the very rows again.
        keys = None if self.read is None else row_keys(self.read.to(self.dtype))
        ids = None if keys is None else dispatch_of(keys, self.received, self.num_experts)
        if ids is None:
            raise SieveError(
                f"The experts of a {type(self.block).__name__} received rows that its router did not read, and the "
                "router returns no expert ids. Register a family whose watch() reports the dispatch "
                "(peft_sieve.register_moe_family)."
            )
        if self.logits is None or self.logits.shape[0] != ids.shape[0]:
            warnings.warn(
                f"The router of a {type(self.block).__name__} returns neither expert weights nor logits: the profile's "
                "mass counts every routed token as 1."
            )
            weights = torch.ones(ids.shape, device=ids.device)
        else:
            weights = self.family.weights_of_logits(self.logits.to(ids.device), ids, self.block)
        self.on_dispatch(ids, weights)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, torch.Tensor)]


def _floats(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    values = (*args, *kwargs.values())
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


class SwitchExperts(ModuleExperts):
    """switch_transformers: the container is given a one-hot mask, which lacks the tokens beyond an expert's capacity,
    and the weight of the one expert."""

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        mask, weights = super().read_call(args, kwargs)  # (tokens, 1, num_experts), (tokens, 1)
        dropped = mask.sum(-1) == 0
        return mask.argmax(-1).masked_fill(dropped, mask.shape[-1]), weights


# nllb_moe hands its container a mask of zeros and ones, which that takes for expert ids: only experts 0 and 1 run, and
# the first of them on every token several times. The profile says what runs.
MODULE_FAMILIES: tuple[MoEFamily, ...] = (
    ModuleExperts("gated_mlps", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj"),
    ModuleExperts("mixtral_mlps", gate_proj="w1", up_proj="w3", down_proj="w2", normalized=True),
    SwitchExperts("switch_transformers", up_proj="wi", down_proj="wo"),
    ModuleExperts("nllb_moe", up_proj="fc1", down_proj="fc2"),
)
