"""Adapters on experts that are separate modules in a `ModuleList`.

The block keeps calling its experts as it always did. The layer stands in for the list, keeps the factors packed, and
adds each adapted expert's share in a hook on its linear layers. (Factors inside the experts would have keys such as
`experts.3.gate_proj.lora_A`, which transformers rewrites when it loads adapters.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import SieveError
from ...moe.placement import is_offloaded
from ...moe.topology import MoELayer
from .config import SieveLoraConfig
from .layer import SieveExpertLayer


class ModuleListSieveExperts(SieveExpertLayer):
    """LoRA on some experts of a `ModuleList`; indexing, length and iteration are those of the list."""

    base_layer: nn.ModuleList

    def __init__(self, base_layer: nn.Module, layer: MoELayer) -> None:
        super().__init__(base_layer, layer)
        self._hooks: dict[tuple[str, int], Any] = {}

    def update_layer(
        self, adapter_name: str, experts: Any, config: SieveLoraConfig, without_values: bool = False
    ) -> None:
        super().update_layer(adapter_name, experts, config, without_values)
        for projection in self.plans[adapter_name].ranks:
            for expert in experts:
                if (projection, expert) not in self._hooks:
                    linear = getattr(self.base_layer[expert], projection)
                    # A partial of a bound method follows its layer through copy.deepcopy; a closure would not.
                    hook = partial(self._add_delta, projection, expert)
                    self._hooks[projection, expert] = linear.register_forward_hook(hook)

    def _add_delta(
        self, projection: str, expert: int, linear: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        for name in self.applied_adapters():
            plan = self.plans[name]
            factors = self.factors(name, projection)
            if factors is None or expert not in plan.experts:
                continue
            a, b, scaling = factors
            slot = plan.experts.index(expert)
            # In the type of the layer's output, under autocast the lower one, and where that is.
            x = self.lora_dropout[name](args[0]).to(output)
            inner = F.linear(x, a[slot].to(output.dtype))  # (tokens, rank)
            output = output + scaling * (inner @ b[slot].to(output.dtype))
        return output

    def check_mergeable(self) -> None:
        """Refuse to merge into quantised weights, and into offloaded ones, which nobody would write back.

        Raises:
            SieveError: the experts are either.
        """
        super().check_mergeable()
        if is_offloaded(self.base_layer):
            raise SieveError(
                f"merging was asked for, and the experts of {self.path} are separate modules that are offloaded, "
                "expected them in memory: load the model without offload and merge there"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        return base_layer

    def __getitem__(self, index: Any) -> Any:
        return self.base_layer[index]

    def __len__(self) -> int:
        return len(self.base_layer)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.base_layer)
