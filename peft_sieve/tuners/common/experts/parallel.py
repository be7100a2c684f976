"""Adapters on experts in pairs of stacks that are called on rows sorted by expert (`ParallelExperts`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ....moe.families.parallel import ParallelExperts
from ....moe.topology import MoELayer
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
        return self._adapted(INPUT_PROJECTIONS, inputs, expert_size, self.base_layer(inputs, expert_size))

    def _output_linear_done(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        inputs, expert_size = args
        return self._adapted(("down_proj",), inputs, expert_size, output)

    def _adapted(
        self, group: tuple[str, ...], inputs: torch.Tensor, expert_size: list[int], output: torch.Tensor
    ) -> torch.Tensor:
        if not self.applied_adapters():
            return output
        projections = [projection for projection in group if projection in self.shape.projections]
        widths = [self.shape.projections[projection][1] for projection in projections]
        rows = []
        for expert, (x, y) in enumerate(zip(inputs.split(expert_size), output.split(expert_size), strict=True)):
            parts = zip(projections, y.split(widths, dim=-1), strict=True)
            rows.append(
                torch.cat([self.with_deltas(projection, expert, x, part) for projection, part in parts], dim=-1)
            )
        return torch.cat(rows)

    def expert_weight(self, projection: str, expert: int) -> torch.Tensor:
        return self.family.expert_weight(self._block[0], projection, expert)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self._hook.remove()
        return base_layer
