"""Selection anew at every step: all experts have an adapter, and a step changes only the hottest of its own batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from peft_sieve import RoutingProfile, SieveExpertLayer, select_experts
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.plain_model import unwrapped


class StepSelection:
    """Counts what a forward dispatches, and keeps an optimizer's step off the experts that received little of it.

    An expert that is left out keeps its values; its moments in the optimizer fade as they do for a gradient of zero.

    Args:
        share: of each layer's experts, to be changed by a step.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        base = unwrapped(model)
        self.layers = {layer.path: layer for layer in find_moe_layers(base)}
        self.adapters: dict[str, SieveExpertLayer] = {path: base.get_submodule(path) for path in self.layers}
        self.counts: dict[str, Tensor] = {}
        self.real: Tensor | None = None
        self._base = base

    @contextmanager
    def watching(self) -> Iterator[StepSelection]:
        with ExitStack() as stack:
            for path, layer in self.layers.items():
                parent = self._base.get_submodule(path.rpartition(".")[0])
                for handle in layer.family.watch(self.adapters[path], parent, partial(self._count, path)):
                    stack.callback(handle.remove)
            yield self

    def begin(self, attention_mask: Tensor) -> None:
        """Before the forward of a batch; padding will not count."""
        self.real = attention_mask.flatten().bool()
        self.counts.clear()

    def _count(self, path: str, expert_ids: Tensor, expert_weights: Tensor) -> None:
        num_experts = self.layers[path].num_experts
        self.counts[path] = torch.bincount(expert_ids[self.real].flatten(), minlength=num_experts)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Around clipping and the optimizer's step, after the backward."""
        selected = select_experts(RoutingProfile(counts=self.counts), top_k_frac=self.share)
        kept = []
        for path, adapter in self.adapters.items():
            others = torch.ones(self.layers[path].num_experts, dtype=torch.bool)
            others[list(selected[path])] = False
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.grad[others] = 0.0
                    kept.append((parameter, others, parameter.detach()[others]))
        yield
        with torch.no_grad():
            for parameter, others, values in kept:
                parameter[others] = values
