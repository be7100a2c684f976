"""Experts in pairs of stacks that are multiplied one after the other: `ParallelExperts`, called on sorted rows.

A block holds `input_linear`, `output_linear`, both called with rows sorted by expert and the number of rows of each,
and the router. jetmoe has two such blocks a layer: one is its MLP (gated), one projects queries and attention outputs
(not gated). Granite's MoE models looked like this in transformers 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .family import ExpertsShape, MoEFamily, OnDispatch


class ParallelExperts(MoEFamily):
    """A block with `input_linear`, `output_linear` and `router`. `up_proj` and `gate_proj`, which are concatenated, are
    what goes in; `down_proj` is what comes out.

    Router and experts are in one module, so the adapter layer stands in the place of `input_linear`.
    """

    name = "parallel_experts"
    call = "sorted_rows"
    in_stacks = True
    adapted_child = "input_linear"

    def matches(self, module: nn.Module) -> bool:
        stacks = [getattr(module, name, None) for name in ("input_linear", "output_linear")]
        return hasattr(module, "router") and all(
            isinstance(stack, nn.Module)
            and getattr(getattr(stack, "weight", None), "ndim", 0) == 3
            and hasattr(stack, "num_experts")
            for stack in stacks
        )

    def shape(self, experts: nn.Module) -> ExpertsShape:
        num_experts, out_features, in_features = _weight(experts, "input_linear").shape
        _, hidden_size, width = _weight(experts, "output_linear").shape
        gate = {"gate_proj": (in_features, width)} if out_features == 2 * width else {}
        return ExpertsShape(num_experts, {**gate, "up_proj": (in_features, width), "down_proj": (width, hidden_size)})

    def expert_weight(self, experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
        if projection == "down_proj":
            return _weight(experts, "output_linear")[expert]
        into = _weight(experts, "input_linear")[expert]
        width = self.shape(experts).intermediate_size
        return into[:width] if projection == "gate_proj" else into[-width:]

    def parameter_names(self, experts: nn.Module, projections: list[str]) -> list[str]:
        return sorted({("output" if p == "down_proj" else "input") + "_linear.weight" for p in projections})

    def watch(self, experts: nn.Module, parent: nn.Module, on_dispatch: OnDispatch) -> list[Any]:
        router: Any = parent.router

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Pairs are numbered token by token; the router sorted them by expert.
            pairs, _, weights, rows_per_expert, _ = output
            sizes = torch.as_tensor(rows_per_expert, device=pairs.device)
            ids = torch.empty_like(pairs)
            ids[pairs] = torch.arange(len(sizes), device=pairs.device).repeat_interleave(sizes)
            in_order = torch.empty_like(weights)
            in_order[pairs] = weights
            on_dispatch(ids.view(-1, router.top_k), in_order.view(-1, router.top_k))

        return [router.register_forward_hook(hook)]


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    return getattr(block, name).weight.data
