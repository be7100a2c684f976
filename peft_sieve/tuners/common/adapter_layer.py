"""Where the parts of an adapter are, and in which type: as what they stand beside."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import SieveError
from ...moe.placement import execution_device, first_tensor


class AdapterLayer(BaseTunerLayer):
    """A layer that holds the parts of its adapters in `nn.ModuleDict`s, by their names.

    Attributes:
        second_factor_names: which of `adapter_layer_names` are factors on the side of the output, LoRA's B, for
            optimizers that train those otherwise.
    """

    second_factor_names: ClassVar[tuple[str, ...]] = ()

    def beside(self) -> nn.Module:
        """The module whose device and type new adapters take."""
        return self.get_base_layer()

    def parts(self, adapter_name: str, names: tuple[str, ...] | None = None) -> list[Any]:
        """What the layer holds under an adapter's name: its factors, or what `names` say."""
        held = (getattr(self, name) for name in (self.adapter_layer_names if names is None else names))
        return [
            modules[adapter_name] for modules in held if isinstance(modules, nn.ModuleDict) and adapter_name in modules
        ]

    def place_new(self, adapter_name: str) -> None:
        """Take a new adapter's factors to where the layer computes, and to its type if that is not a type of 8 bits."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        dtype = first_tensor(self.beside()).dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            for module in self.parts(adapter_name):
                module.to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The type stays: PEFT calls this after loading, too, where a half-precision base would round loaded values. And
        # it calls it for every layer of the model, whether it has the adapter or not.
        modules = self.parts(adapter_name, (*self.adapter_layer_names, *self.other_param_names))
        device = device or (execution_device(self.beside()) if modules else None)
        for module in modules:
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(device)

    # Unless a layer merges

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused."""
        raise SieveError(f"The adapters of a {type(self).__name__} cannot be merged.")

    def unmerge(self) -> None:
        """Nothing to do, since nothing was merged."""
