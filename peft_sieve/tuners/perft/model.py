"""`PerftModel`: the tuner that puts adapters beside MoE blocks."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ...checks import shown
from ...errors import SieveError
from ...routing.distributed import check_agreement
from ..common.balance import BalanceLoss
from ..common.balance_in_trainers import BalancedTuner
from ..common.calibrate import calibrate
from ..common.mask import check_mask, shape_of
from ..common.targets import exactly, is_wanted
from .blocks import MoEBlock, find_moe_blocks
from .config import PerftConfig
from .layer import CHILD, NO_MERGING, PerftLayer, attach, detach


class PerftModel(BalancedTuner):
    """A model with PERFT adapters beside its MoE blocks.

    Made by `get_peft_model` or `PeftModel.from_pretrained`.
    """

    prefix = "perft_"
    tuner_layer_cls = PerftLayer
    # None are taken by their names.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    no_merging = NO_MERGING
    no_weighted_sum = (
        "PERFT adapters have no weighted sum: they have routers and activations. Activate several at the same time "
        "(model.base_model.set_adapter with a list), which adds up what they give."
    )
    no_mixed_batches = (
        "adapter_names is not supported for PERFT adapters, which see tokens and not rows. Call set_adapter, and run "
        "one adapter after the other."
    )

    # Before injection: everything that can go wrong, goes wrong here

    def _prepare_adapter_config(self, peft_config: PerftConfig, model_config: dict[str, Any]) -> PerftConfig:
        """Find the blocks, and for E the experts. The model is not changed."""
        found = find_moe_blocks(self.model)
        blocks = _wanted(peft_config, found)
        if peft_config.variant == "E":
            if peft_config.selected_experts is not None:
                check_mask(peft_config, [layer for block in found for layer in block.layers])
                blocks = _with_named_experts(peft_config, blocks)
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
        if config.selects:
            if config.selected_experts is None:
                calibrate(config, self.model, layers)
            given = config.selected_experts or {}
            mask = config.selected_experts = {
                layer.path: given[layer.path] for layer in layers if given.get(layer.path)
            }
            layers = [layer for layer in layers if layer.path in mask]
            if not config.inference_mode:
                check_agreement("selected_experts", {path: list(ids) for path, ids in mask.items()})
        config.expert_shapes = {layer.path: shape_of(layer) for layer in layers}
        return [block for block in blocks if block.layers[0] in layers]

    # Injection

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: Any, name: str, parent: Any, current_key: str, **kwargs: Any
    ) -> None:
        layer = getattr(target, CHILD, None)
        if layer is not None:
            layer.update_layer(adapter_name, config)
            return
        layer = PerftLayer(target, self._found[current_key], BalanceLoss.hung_on(self.model))
        self._updated(layer, adapter_name, config)
        attach(target, layer)

    # Use

    def auxiliary_loss(self) -> torch.Tensor:
        """The balance loss of R's router in the last training forward, times `balance_loss_coef`: a scalar.

        `outputs.loss` of a forward with labels has it already. Add it to a loss that you make from logits yourself.

        Returns:
            The sum over active adapters of the coefficient times the mean over blocks; zero if none has a router.

        Raises:
            SieveError: there was no forward in training mode with gradients.
        """
        loss = super().auxiliary_loss()
        if loss is None:
            raise SieveError(
                "There was no forward in training mode with gradients, whose balance loss this could be. Call train() "
                "and the model first."
            )
        return loss

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT calls this to put back what a layer wraps. The block is there all the time.
        if isinstance(child, PerftLayer):
            detach(parent)
        else:  # a module that may have been trained whole
            super()._replace_module(parent, child_name, new_module, child)


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
        given = " and ".join(f"{n}={shown(getattr(config, n))}" for n in names if getattr(config, n) is not None)
        if not blocks:
            raise SieveError("The model has no MoE blocks that PERFT can adapt.")
        raise SieveError(
            f"The settings {given} leave none of the model's {len(blocks)} MoE blocks. Change them so that at least "
            f"one is left, such as {blocks[0].path}."
        )
    return kept


def _with_named_experts(config: PerftConfig, blocks: list[MoEBlock]) -> list[MoEBlock]:
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
