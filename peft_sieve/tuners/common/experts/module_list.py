"""Adapters on experts that are separate modules in a `ModuleList` or `ModuleDict`.

The block keeps calling its experts as it always did. The layer stands in for the list, keeps the factors packed, and
adds each adapted expert's share in a hook on its linear layers. (Factors inside the experts would have keys such as
`experts.3.gate_proj.lora_A`, which transformers rewrites when it loads adapters.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ....moe.families.modules import ModuleExperts
from ....moe.topology import MoELayer
from .layer import SieveExpertLayer


class ModuleListSieveExperts(SieveExpertLayer):
    """LoRA on some experts of a `ModuleList` or `ModuleDict`; called, indexed and iterated over like it."""

    base_layer: Any
    family: ModuleExperts

    def __init__(self, base_layer: nn.Module, layer: MoELayer) -> None:
        super().__init__(base_layer, layer)
        self._hooks: dict[tuple[str, int], Any] = {}

    def update_layer(self, adapter_name: str, experts: Any, config: Any, without_values: bool = False) -> None:
        super().update_layer(adapter_name, experts, config, without_values)
        plan = self.plans[adapter_name]
        for projection in plan.ranks:
            for expert in plan.adapted:
                if (projection, expert) not in self._hooks:
                    linear = self.family.linear(self.base_layer, projection, expert)
                    # A partial of a bound method follows its layer through copy.deepcopy; a closure would not.
                    hook = partial(self._add_delta, projection, expert)
                    self._hooks[projection, expert] = linear.register_forward_hook(hook)

    def _add_delta(
        self, projection: str, expert: int, linear: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        return self.with_deltas(projection, expert, args[0], output)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        return base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The container's own forward, if it has one."""
        return self.base_layer(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        return self.base_layer[index]

    def __len__(self) -> int:
        return len(self.base_layer)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base_layer)

    def __contains__(self, key: Any) -> bool:
        return key in self.base_layer
