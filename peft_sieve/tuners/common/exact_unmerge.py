"""PEFT's own LoRA layers, with an `unmerge` that gives the base weights back bit for bit, also where those are
offloaded.

PEFT subtracts what it added, which leaves rounding behind, and moves adapters to where the base weights are, which for
offloaded ones is nowhere, and to their type, which rounds what was loaded with `low_cpu_mem_usage`. And its wrapper of
a parameter takes no mixed batches; the one here does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...moe.placement import execution_device, onloaded, onloaded_for_change
from .each_adapter import each_adapter


class _ExactUnmerge:
    _before_merge: torch.Tensor | None = None
    _is_new = False

    def _base_parameter(self) -> torch.Tensor:
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with onloaded_for_change(self):  # type: ignore[arg-type]
            if not self.merged:  # type: ignore[attr-defined]
                self._before_merge = self._base_parameter().detach().clone()
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        if not self.merged:  # type: ignore[attr-defined]
            # The experts of the same model may be merged while this layer had nothing to merge: no reason to warn.
            return
        with onloaded_for_change(self):  # type: ignore[arg-type]
            super().unmerge()  # type: ignore[misc]
            if self._before_merge is not None:
                self._base_parameter().data.copy_(self._before_merge)
        self._before_merge = None

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self._is_new = True
        try:
            super().update_layer(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._is_new = False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        base = self.get_base_layer()  # type: ignore[attr-defined]
        if self._is_new:  # the base's type is wanted, if nobody says otherwise
            with onloaded(base):
                super()._move_adapter_to_device_of_base_layer(adapter_name, device)  # type: ignore[misc]
            return
        for factors in (self.lora_A, self.lora_B):  # type: ignore[attr-defined]
            if adapter_name in factors and not factors[adapter_name].weight.is_meta:
                factors[adapter_name].to(device or execution_device(base))


class ExactLinear(_ExactUnmerge, Linear):
    """`lora.Linear` with an exact `unmerge`.

    Attributes:
        shows_in_weight: its model never calls it, but multiplies by its weight itself, in which the adapters then show.
    """

    shows_in_weight = False

    def _base_parameter(self) -> torch.Tensor:
        return self.get_base_layer().get_parameter("weight")

    @property
    def weight(self) -> torch.Tensor:
        if self.shows_in_weight and self.disable_adapters and self.merged:
            self.unmerge()
        weight = super().weight
        if not self.shows_in_weight or self.disable_adapters or self.merged:
            return weight
        for name in self.active_adapters:
            if name in self.lora_A:
                weight = weight + self.get_delta_weight(name)
        return weight


class ExactParamWrapper(_ExactUnmerge, ParamWrapper):
    """`lora.ParamWrapper` (here: the router's weight) with an exact `unmerge`, and for mixed batches."""

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """As the router's; with `adapter_names`, one for each entry of the inputs, each entry with its adapter."""
        # The wrapper reads the weight itself, outside the forward of its module.
        with onloaded(self.get_base_layer()):
            if adapter_names is None or self.disable_adapters:
                return super().forward(*args, **kwargs)
            return each_adapter(self._forward_with, adapter_names, args, kwargs)

    def _forward_with(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with self._activate_lora([adapter_name]):
            return self.base_layer(*args, **kwargs)

    def _base_parameter(self) -> torch.Tensor:
        return self.get_param()


def exact_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's layer around a linear layer or a parameter, with an exact `unmerge`; None where PEFT has others, as for
    quantised weights."""
    if kwargs.get("parameter_name") is not None:
        return ExactParamWrapper(target, adapter_name, config=config, **kwargs)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    # Weights of a library's own kind have a layer of PEFT's.
    if isinstance(base, nn.Linear) and type(base.weight).__module__.partition(".")[0] == "torch":
        kwargs.pop("parameter_name", None)
        return ExactLinear(target, adapter_name, config=config, **kwargs)
    return None
