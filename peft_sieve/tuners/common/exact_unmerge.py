"""PEFT's own LoRA layers, with a `merge` that changes no other layer's weights and an `unmerge` that gives the base
weights back bit for bit, also where those are offloaded.

PEFT adds to whatever weight the layer has, also where another layer has the same one (tied embeddings), and subtracts
what it added, which leaves rounding behind. It moves adapters to where the base weights are, which for offloaded ones
is nowhere, and to their type, which rounds what was loaded with `low_cpu_mem_usage`. And its wrapper of a parameter
takes no mixed batches; the one here does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...moe.placement import execution_device, is_offloaded, onloaded, onloaded_for_change
from .each_adapter import each_adapter


class ExactUnmerge:
    """A layer of PEFT's around a module with a weight, which merges into nothing but its own and unmerges exactly.

    Attributes:
        weight_is_shared: another module has the same weight. While merged, this layer has one of its own.
        put_aside: the shared weight, meanwhile; in a tuple, or it would be registered as this layer's.
    """

    weight_is_shared = False
    put_aside: tuple[nn.Parameter, ...] = ()
    parameter_name = "weight"
    _before_merge: torch.Tensor | None = None
    _is_new = False

    def base_parameter(self) -> nn.Parameter:
        """The weight that adapters are merged into."""
        weight: nn.Parameter = getattr(self.get_base_layer(), self.parameter_name)  # type: ignore[attr-defined]
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with onloaded_for_change(self):  # type: ignore[arg-type]
            if not self.merged:  # type: ignore[attr-defined]
                self._keep_weight()
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            finally:
                if not self.merged:  # type: ignore[attr-defined]
                    self._put_back()

    def unmerge(self) -> None:
        # The experts of the same model may be merged while this layer had nothing to merge: no reason to warn.
        if self.merged:  # type: ignore[attr-defined]
            with onloaded_for_change(self):  # type: ignore[arg-type]
                self._put_back()
            self.merged_adapters.clear()  # type: ignore[attr-defined]

    def _keep_weight(self) -> None:
        weight = self.base_parameter()
        copied = weight.detach().clone()
        # Of offloaded weights one cannot see whether they are shared.
        if self.weight_is_shared or is_offloaded(self.get_base_layer()):  # type: ignore[attr-defined]
            self.put_aside = (weight,)
            self._set_base_parameter(nn.Parameter(copied, weight.requires_grad))
        else:
            self._before_merge = copied

    def _put_back(self) -> None:
        own = self.base_parameter()
        for weight in self.put_aside:
            weight.data = weight.data.to(own)  # which may have been moved meanwhile
            self._set_base_parameter(weight)
        if self._before_merge is not None:
            own.data.copy_(self._before_merge)
        self.put_aside, self._before_merge = (), None

    def _set_base_parameter(self, parameter: nn.Parameter) -> None:
        setattr(self.get_base_layer(), self.parameter_name, parameter)  # type: ignore[attr-defined]

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
        for name in self.adapter_layer_names:  # type: ignore[attr-defined]
            factors = getattr(self, name)
            part = factors[adapter_name] if adapter_name in factors else nn.Identity()
            for tensor in [part] if isinstance(part, nn.Parameter) else part.parameters():
                if not tensor.is_meta:
                    tensor.data = tensor.data.to(device or execution_device(base))


class ExactLinear(ExactUnmerge, Linear):
    """`lora.Linear` with an exact `unmerge`.

    Attributes:
        shows_in_weight: its model never calls it, but multiplies by its weight itself, in which the adapters then show.
    """

    shows_in_weight = False

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


class ExactEmbedding(ExactUnmerge, Embedding):
    """`lora.Embedding` with an exact `unmerge`."""


class ExactConv1d(ExactUnmerge, Conv1d):
    """`lora.Conv1d` with an exact `unmerge`."""


class ExactConv2d(ExactUnmerge, Conv2d):
    """`lora.Conv2d` with an exact `unmerge`."""


class ExactConv3d(ExactUnmerge, Conv3d):
    """`lora.Conv3d` with an exact `unmerge`."""


class ExactParamWrapper(ExactUnmerge, ParamWrapper):
    """`lora.ParamWrapper` (here: the router's weight) with an exact `unmerge`, and for mixed batches."""

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """As the router's; with `adapter_names`, one for each entry of the inputs, each entry with its adapter."""
        if self.disable_adapters:
            self.unmerge()  # where the weight is written back, which below it is not
        # The wrapper reads the weight itself, outside the forward of its module.
        with onloaded(self.get_base_layer()):
            if adapter_names is None or self.disable_adapters:
                return super().forward(*args, **kwargs)
            return each_adapter(self._forward_with, adapter_names, args, kwargs)

    def _forward_with(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with self._activate_lora([adapter_name]):
            return self.base_layer(*args, **kwargs)


_EXACT: dict[type[nn.Module], type[Any]] = {
    nn.Linear: ExactLinear,
    nn.Embedding: ExactEmbedding,
    nn.Conv1d: ExactConv1d,
    nn.Conv2d: ExactConv2d,
    nn.Conv3d: ExactConv3d,
}


def exact_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's layer around a module or a parameter, with an exact `unmerge`; None where PEFT has others, as for
    quantised weights."""
    if kwargs.get("parameter_name") is not None:
        return ExactParamWrapper(target, adapter_name, config=config, **kwargs)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer_class = next((exact for kind, exact in _EXACT.items() if isinstance(base, kind)), None)
    # Weights of a library's own kind have a layer of PEFT's.
    if layer_class is None or type(base.weight).__module__.partition(".")[0] != "torch":
        return None
    kwargs.pop("parameter_name", None)
    layer: nn.Module = layer_class(target, adapter_name, config=config, **kwargs)
    return layer
