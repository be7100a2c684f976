"""`PerftModel`: the tuner that puts adapters beside MoE blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from ...errors import SieveError
from ...routing.distributed import check_agreement
from ..common.calibrate import calibrate
from ..common.mask import check_mask, shape_of
from ..common.names import check_adapter_name
from ..common.sft_loss import add_to_sft_loss
from ..common.targets import exactly, is_wanted
from .balance import auxiliary_loss, start_adding, stop_adding
from .blocks import MoEBlock, find_moe_blocks
from .config import PerftConfig
from .layer import CHILD, REFUSED_MERGE, PerftLayer, attach, detach
from .loading import check_state_dict


class PerftModel(BaseTuner):
    """A model with PERFT adapters beside its MoE blocks.

    Made by `get_peft_model` or `PeftModel.from_pretrained`.
    """

    prefix = "perft_"
    tuner_layer_cls = PerftLayer
    # None are taken by their names.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    # Before injection: everything that can go wrong, goes wrong here

    def _prepare_adapter_config(self, peft_config: PerftConfig, model_config: dict[str, Any]) -> PerftConfig:
        """Find the blocks, and for E the experts. The model is not changed."""
        found = find_moe_blocks(self.model)
        blocks = _wanted(peft_config, found)
        if peft_config.variant == "E":
            if peft_config.selected_experts is not None:
                check_mask(peft_config.selection(), [layer for block in found for layer in block.layers])
                blocks = _named(peft_config, blocks)
            blocks = self._with_experts(peft_config, blocks)
        paths = {block.path for block in blocks}
        self._found = {block.path: block for block in blocks}
        peft_config.target_modules = exactly(paths, peft_config, self.model)  # type: ignore[assignment]
        return peft_config

    def _with_experts(self, config: PerftConfig, blocks: list[MoEBlock]) -> list[MoEBlock]:
        """The blocks in which experts get an adapter, after filling in which."""
        for block in blocks:
            if len(block.layers) > 1:
                raise SieveError(
                    f"{block.path} holds {len(block.layers)} sets of experts, expected one for variant E, which has an "
                    "adapter for each expert: use variant R, D or S"
                )
            if getattr(block.layers[0].experts, "_is_expert_parallel", False):
                raise SieveError(
                    f"the experts of {block.path} are spread over processes (expert parallelism), expected all in each "
                    "for variant E: load the model without it, or use variant R, D or S"
                )
        layers = [block.layers[0] for block in blocks]
        selection = config.selection()
        if config.selects:
            if config.selected_experts is None:
                calibrate(selection, self.model, layers)
            given = selection.selected_experts or {}
            mask = config.selected_experts = {
                layer.path: given[layer.path] for layer in layers if given.get(layer.path)
            }
            config.calibration = selection.calibration
            layers = [layer for layer in layers if layer.path in mask]
            if not config.inference_mode:
                check_agreement("selected_experts", {path: list(ids) for path, ids in mask.items()})
        config.expert_shapes = {layer.path: shape_of(layer) for layer in layers}
        return [block for block in blocks if block.layers[0] in layers]

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: PerftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(target, CHILD, None)
        if layer is not None:
            layer.update_layer(adapter_name, peft_config)
            return
        layer = PerftLayer(target, self._found[current_key])
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # As PEFT: an additional adapter does not become trainable by being added.
            layer.requires_grad_(False)
        attach(target, layer)
        start_adding(self.model)

    # Loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PerftConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        check_state_dict(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, dict(state_dict))

    # Use

    def train(self, mode: bool = True) -> PerftModel:
        """As PyTorch's. Trainers call it before every step, by when TRL's is there to be told of the balance loss."""
        if mode:
            add_to_sft_loss()
        return super().train(mode)

    def auxiliary_loss(self) -> torch.Tensor:
        """The balance loss of R's router in the last training forward, times `aux_loss_coef`: a scalar.

        `outputs.loss` of a forward with labels has it already. Add it to a loss that you make from logits yourself.

        Returns:
            The sum over active adapters of the coefficient times the mean over blocks; zero if none has a router.

        Raises:
            SieveError: there was no forward in training mode with gradients.
        """
        return auxiliary_loss(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SieveError(
                "adapter_names was passed to a model with PERFT adapters, expected a batch for one adapter, since they "
                "see tokens and no rows: call set_adapter and run one adapter after the other"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            SieveError: always.
        """
        raise SieveError(
            "add_weighted_adapter was called on PERFT adapters, expected none of that, since routers and activations "
            "have no weighted sum: make the adapters active at the same time (model.base_model.set_adapter with a "
            "list), which adds up what they give"
        )

    def _check_merge_allowed(self) -> None:
        raise SieveError(REFUSED_MERGE)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT calls this to put back what a layer wraps. The block is there all the time.
        detach(parent)

    def unload(self) -> nn.Module:
        """The base model without adapters."""
        model = super().unload()
        stop_adding(self.model)
        return model


def _wanted(config: PerftConfig, blocks: list[MoEBlock]) -> list[MoEBlock]:
    """The blocks that the settings leave over.

    Raises:
        SieveError: none is left.
    """
    kept = [block for block in blocks if is_wanted(config, block.path)]
    if config.target_modules is not None:
        kept = [block for block in kept if check_target_module_exists(config, block.path)]
    if not kept:
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        given = " and ".join(f"{n}={getattr(config, n)}" for n in names if getattr(config, n) is not None)
        shown = f"such as {blocks[0].path}" if blocks else "but the model has none outside of attention"
        raise SieveError(
            f"the settings {given or 'given'} leave none of the model's {len(blocks)} MoE blocks, expected at least "
            f"one, {shown}: change them"
        )
    return kept


def _named(config: PerftConfig, blocks: list[MoEBlock]) -> list[MoEBlock]:
    """Those of the blocks in which `selected_experts` names experts.

    Raises:
        SieveError: it names none in any.
    """
    mask = config.selected_experts or {}
    named = [block for block in blocks if any(mask.get(layer.path) for layer in block.layers)]
    if not named:
        raise SieveError(
            f"selected_experts names experts of {next(iter(mask))}, and the other settings leave blocks such as "
            f"{blocks[0].path}, expected one in common: change target_modules, exclude_modules or "
            "layers_to_transform, or the mask"
        )
    return named
