"""A method of its own, as one that somebody adds: what it does, and one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from torch import nn

from peft_sieve.hf.methods import Method, register
from peft_sieve.tuners.common.adapter_layer import AdapterLayer
from peft_sieve.tuners.common.config import MethodConfig
from peft_sieve.tuners.common.tuner import MethodTuner


@dataclass
class ToyConfig(MethodConfig):
    target_modules: list[str] | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TOY")


class ToyLayer(nn.Module, AdapterLayer):
    """A linear layer beside a linear layer."""

    adapter_layer_names = ("toy_linear",)
    other_param_names = ("factor",)

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.factor, self.toy_linear = base_layer, {}, nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []

    def update_layer(self, adapter_name: str, config: ToyConfig) -> None:
        base = self.base_layer
        self.factor[adapter_name] = config.factor
        self.toy_linear[adapter_name] = nn.Linear(base.in_features, base.out_features, bias=False)
        self.place_new(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.toy_linear]
        return self.base_layer(x) + sum(self.factor[name] * self.toy_linear[name](x) for name in names)


class ToyModel(MethodTuner):
    prefix = "toy_"
    tuner_layer_cls = ToyLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: Any,
        name: str,
        parent: Any,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, ToyLayer):
            target.update_layer(adapter_name, config)
        else:
            setattr(parent, name, self._updated(ToyLayer(target), adapter_name, config))


register(Method(name="TOY", config=ToyConfig, model=ToyModel, title="Toy adapters", tags=("toy",)))
