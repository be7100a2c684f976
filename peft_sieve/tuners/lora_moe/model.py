"""`LoraMoeModel`: puts LoRA experts around linear layers, and prunes them during training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...checks import listed
from ...errors import SieveError
from ..common.balance import BalanceLoss
from ..common.balance_in_trainers import BalancedTuner
from ..common.optimizers import remember_optimizers
from .config import LoraMoeConfig
from .layer import LoraMoeLayer, lora_moe_layers
from .loading import fit_to_weights
from .pruning import update_and_prune
from .targets import CLASSIFIERS, resolve_linear_targets


class LoraMoeModel(BalancedTuner):
    """A model with mixtures of LoRA experts around its linear layers (DMEP, arXiv 2604.26340).

    Made by `get_peft_model` or `PeftModel.from_pretrained`; the arguments are those of PEFT's tuners. In training, the
    balance loss is added to `outputs.loss`, where the model is given labels.
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraMoeLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's, as it declares it)
    no_merging = (
        "LoRA experts cannot be merged: each token has its own mixture of them. Keep the adapter, or use LoraConfig "
        "where it must be merged."
    )
    no_weighted_sum = (
        "LoRA experts have no weighted sum. Activate several with set_adapter([...]) of model.base_model, which adds "
        "up what they give."
    )
    no_mixed_batches = (
        "adapter_names is not supported for LoRA experts. Call set_adapter, and the model once for each adapter."
    )

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        remember_optimizers()
        given: Any = self.peft_config[adapter_name]
        if given.task_type in CLASSIFIERS and given.modules_to_save is None:
            # PEFT adds the heads only afterwards, to the list of the configuration that was passed; both have it then.
            given.modules_to_save = []
        # Pruning writes into the configuration, which the caller may use again.
        self.peft_config[adapter_name] = copy.copy(given)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: LoraMoeConfig, model_config: dict[str, Any]) -> LoraMoeConfig:
        resolve_linear_targets(peft_config, self.model)
        return peft_config

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: Any, name: str, parent: Any, current_key: str, **kwargs: Any
    ) -> None:
        experts = (config.kept_experts or {}).get(current_key)
        if isinstance(target, LoraMoeLayer):
            target.update_layer(adapter_name, config, experts)
            return
        layer = LoraMoeLayer(target, current_key, BalanceLoss.hung_on(self.model))
        self._replace_module(parent, name, self._updated(layer, adapter_name, config, experts), target)

    # Loading

    @classmethod
    @contextmanager
    def _fitted(
        cls, model: nn.Module, config: LoraMoeConfig, adapter_name: str, given: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        fit_to_weights(model, config, adapter_name, given)
        yield

    # Training

    def auxiliary_loss(self) -> torch.Tensor:
        """The balance loss of the last forward in training: a scalar, `balance_loss_coef` included.

        To be added to a loss that is made outside the model. Where the model was given labels, its `outputs.loss` has
        it already. Zero after pruning, and where there was no such forward.
        """
        loss = super().auxiliary_loss()
        return torch.zeros(()) if loss is None else loss

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
        name = next(iter(self.active_adapters), "") if adapter_name is None else adapter_name
        if name not in self.peft_config:
            raise SieveError(f"There is no adapter {name!r}, only {listed(sorted(self.peft_config))}.")
        found = {}
        for path, layer in lora_moe_layers(self.model):
            if name in layer.plans:
                tokens = layer.usage(name).tokens.double().cpu()
                found[path] = tokens / tokens.sum().clamp(min=1)
        return found
