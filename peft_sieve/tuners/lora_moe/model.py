"""`LoraMoeModel`: puts LoRA experts around linear layers, and prunes them during training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...errors import SieveError
from ..common.names import check_adapter_name
from ..common.optimizers import remember_optimizers
from .config import LoraMoeConfig
from .layer import LoraMoeLayer, refuse_merge
from .loading import fit_to_weights
from .pruning import lora_moe_layers, update_and_prune
from .record import RoutingRecord
from .targets import CLASSIFIERS, resolve_targets


class LoraMoeModel(BaseTuner):
    """A model with mixtures of LoRA experts around its linear layers (DMEP, arXiv 2604.26340).

    Made by `get_peft_model` or `PeftModel.from_pretrained`; the arguments are those of PEFT's tuners. In training, the
    balance loss is added to `outputs.loss`, where the model is given labels.
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraMoeLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's, as it declares it)

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name, model)
        remember_optimizers()
        given: Any = self.peft_config[adapter_name]
        if given.task_type in CLASSIFIERS and given.modules_to_save is None:
            # PEFT adds the heads only afterwards, to the list of the configuration that was passed; both have it then.
            given.modules_to_save = []
        # Pruning writes into the configuration, which the caller may use again.
        self.peft_config[adapter_name] = copy.copy(given)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: LoraMoeConfig, model_config: dict[str, Any]) -> LoraMoeConfig:
        resolve_targets(peft_config, self.model)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: LoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        experts = (peft_config.kept_experts or {}).get(current_key)
        if isinstance(target, LoraMoeLayer):
            target.update_layer(adapter_name, peft_config, experts)
            return
        layer = LoraMoeLayer(target, self._record())
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, experts)
        if adapter_name not in self.active_adapters:
            # As PEFT: an additional adapter does not become trainable by being added.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _record(self) -> RoutingRecord:
        for _, layer in lora_moe_layers(self.model):
            return layer.record
        record = RoutingRecord()
        record.attach(self.model)
        return record

    # Loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraMoeConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        fit_to_weights(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, dict(state_dict))

    # Training

    def auxiliary_loss(self) -> torch.Tensor:
        """The balance loss of the last forward in training: a scalar, `balance_loss_coef` included.

        To be added to a loss that is made outside the model. Where the model was given labels, its `outputs.loss` has
        it already. Zero after pruning, and where there was no such forward.
        """
        for _, layer in lora_moe_layers(self.model):
            return layer.record.auxiliary_loss()
        return torch.zeros(())

    def update_and_prune(self, step: int, optimizer: Any, total_steps: int | None = None) -> bool:
        """Prune the experts, once, when their step has come; to be called after every optimizer step.

        Each layer keeps the experts that were used enough; the others leave its parameters, its router and the states
        of the optimizer. From then on there is no balance loss, and nothing is counted.

        Args:
            step: number of optimizer steps so far, the one just made included.
            optimizer: the one that trains the adapter (or accelerate's wrapper of it), with states that have the shapes
                of their parameters, as those of torch's Adam, AdamW and SGD have; None if there is none.
            total_steps: of the whole training; needed for `prune_ratio`.

        Returns:
            Whether the experts were pruned in this call.

        Raises:
            SieveError: the step is not known, no token was counted, the optimizer cannot follow, or there are several
                processes; nothing was changed.
        """
        configs: dict[str, Any] = self.peft_config
        return update_and_prune(self.model, configs, step, optimizer, total_steps)

    def expert_utilization(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """How much each expert was used in training, until pruning.

        Args:
            adapter_name: default: the active one.

        Returns:
            Path of a layer -> (num_experts,) float64 on the CPU, shares of the tokens routed; zeros where none were.

        Raises:
            SieveError: there is no such adapter.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.peft_config:
            raise SieveError(f"there is no adapter {name!r}, expected one of {sorted(self.peft_config)}: pass its name")
        found = {}
        for path, layer in lora_moe_layers(self.model):
            if name in layer.plans:
                tokens = layer.usage(name).tokens.double().cpu()
                found[path] = tokens / tokens.sum().clamp(min=1)
        return found

    # Use

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SieveError(
                "adapter_names was passed, expected one adapter for the whole batch, since LoRA experts take no mixed "
                "batches: call set_adapter, and the model once for each adapter"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            SieveError: always.
        """
        raise SieveError(
            "add_weighted_adapter was called on LoRA experts, expected none of that, since their routers have no "
            "weighted sum: make the adapters active at the same time (model.base_model.set_adapter with a list), which "
            "adds up what they give"
        )

    def _check_merge_allowed(self) -> None:
        refuse_merge()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            refuse_merge()
        for _, layer in lora_moe_layers(self.model):
            layer.record.detach()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)
