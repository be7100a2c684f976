"""Adapters on experts in pairs of stacks that are called on rows sorted by expert (`ParallelExperts`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...moe.parallel_experts import ParallelExperts
from ...moe.topology import MoELayer
from .layer import INPUT_PROJECTIONS, SieveExpertLayer


class ParallelSieveExperts(SieveExpertLayer):
    """LoRA on some experts of a block with `input_linear` and `output_linear`.

    It stands in the place of `input_linear`, since the block also holds the router; `output_linear` gets a hook.
    """

    family: ParallelExperts

    def __init__(self, base_layer: nn.Module, layer: MoELayer) -> None:
        super().__init__(base_layer, layer)
        # In a tuple: the block holds this layer, so it must not be one of its sub-modules. A copy of the model gets
        # the copy of its block.
        self._block = (layer.experts,)
        output_linear: Any = layer.experts.output_linear
        self._hook = output_linear.register_forward_hook(self._output_linear_done)

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """(rows, hidden) -> (rows, width), gate and up side by side if there is a gate; rows sorted by expert.

        Args:
            expert_size: rows of each expert.
        """
        return self._with_deltas(INPUT_PROJECTIONS, inputs, expert_size, self.base_layer(inputs, expert_size))

    def _output_linear_done(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        inputs, expert_size = args
        return self._with_deltas(("down_proj",), inputs, expert_size, output)

    def _with_deltas(
        self, group: tuple[str, ...], inputs: torch.Tensor, expert_size: list[int], output: torch.Tensor
    ) -> torch.Tensor:
        projections = [projection for projection in group if projection in self.shape.projections]
        for name in self.applied_adapters():
            if self.plans[name].ranks.keys().isdisjoint(projections):
                continue
            # In the type of the output: under autocast that is the lower one.
            rows = self.lora_dropout[name](inputs).to(output.dtype).split(expert_size)
            output = output + torch.cat([self._delta(name, projection, rows) for projection in projections], dim=-1)
        return output

    def _delta(self, name: str, projection: str, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What an adapter adds to one projection of all rows, (rows, out)."""
        factors, slots = self.factors(name, projection), self.plans[name].experts
        shares = []
        for expert, x in enumerate(rows):
            if factors is None or expert not in slots:
                shares.append(x.new_zeros(x.shape[0], self.shape.projections[projection][1]))
                continue
            a, b, scaling = factors
            slot = slots.index(expert)
            shares.append(scaling * (x @ a[slot].to(x.dtype).T @ b[slot].to(x.dtype)))  # (rows, rank) in between
        return torch.cat(shares)

    def expert_weight(self, projection: str, expert: int) -> torch.Tensor:
        return self.family.expert_weight(self._block[0], projection, expert)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self._hook.remove()
        return base_layer
