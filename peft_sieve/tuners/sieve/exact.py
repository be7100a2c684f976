"""PEFT's own LoRA layers, with an `unmerge` that gives the base weights back bit for bit, also where those are
offloaded.

PEFT subtracts what it added, which leaves rounding behind, and moves adapters to where the base weights are, which for
offloaded ones is nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import nn

from ...moe.placement import onloaded, onloaded_for_change


class _ExactUnmerge:
    _before_merge: torch.Tensor | None = None

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

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        with onloaded(self.get_base_layer()):  # type: ignore[attr-defined]
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)  # type: ignore[misc]


class ExactLinear(_ExactUnmerge, Linear):
    """`lora.Linear` with an exact `unmerge`."""

    def _base_parameter(self) -> torch.Tensor:
        return self.get_base_layer().get_parameter("weight")


class ExactParamWrapper(_ExactUnmerge, ParamWrapper):
    """`lora.ParamWrapper` (here: the router's weight) with an exact `unmerge`."""

    def _base_parameter(self) -> torch.Tensor:
        return self.get_param()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # It reads the weight itself, outside the forward of its module.
        with onloaded(self.get_base_layer()):
            return super().forward(*args, **kwargs)


_EXACT: dict[type[nn.Module], type[nn.Module]] = {Linear: ExactLinear, ParamWrapper: ExactParamWrapper}


def with_exact_unmerge(layer: nn.Module) -> nn.Module:
    """`layer` as its exact kind; layers over quantised weights, which have their own classes, stay as they are."""
    # PEFT's dispatchers make the layer and offer no way to name its class.
    layer.__class__ = _EXACT.get(type(layer), type(layer))
    return layer
