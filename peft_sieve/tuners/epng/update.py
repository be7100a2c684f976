"""One step of EPnG: importance from what was routed, and, when the schedule says so, ranks moved by it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...errors import SieveError
from ...routing.distributed import gathered, rank_and_world
from ..common.optimizers import remember
from .config import EpngConfig
from .layer import EpngExpertLayer
from .ragged import RaggedPlan

Layers = dict[str, EpngExpertLayer]


def epng_layers(model: nn.Module) -> Layers:
    """Path in the base model -> layer, of every EPnG adapter layer in `model`."""
    return {module.path: module for module in model.modules() if isinstance(module, EpngExpertLayer)}


def trained_adapters(model: nn.Module) -> list[str]:
    """The names of the EPnG adapters in `model` that are being trained."""
    layers = epng_layers(model).values()
    return sorted({name for layer in layers for name in layer.active_adapters if layer.is_trained(name)})


def update_and_allocate(model: nn.Module, configs: dict[str, Any], step: int, optimizer: Any = None) -> None:
    """Take account of one optimizer step, and move ranks if an update is due.

    Under several processes every one must call it: importance is summed over them, so all move the same.

    Args:
        model: with the adapter layers in it.
        configs: the `EpngConfig` of every adapter, by name; one that changes is replaced by a copy.
        step: the optimizer's, counted from 1 as the Trainer does.
        optimizer: the one in use, or accelerate's wrapper of it; needed if it has taken no step in this process.

    Raises:
        SieveError: no adapter is trained or it is merged; or an update is due, and no routing was counted, the
            parameters are sharded, or the optimizer's states cannot follow. No rank was moved then.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise SieveError(f"step is {step!r}, expected the number of optimizer steps so far: pass a whole number")
    layers = epng_layers(model)
    names = trained_adapters(model)
    if not names:
        raise SieveError(
            f"update_and_allocate was called for a model with {len(layers)} EPnG layers and no EPnG adapter in "
            "training, expected one that is active and has gradients: train an EpngConfig, or leave the call out"
        )
    if any(layer.merged for layer in layers.values()):
        raise SieveError(
            "update_and_allocate was called while an adapter is merged, expected adapters apart from the weights: "
            "call unmerge_adapter first"
        )
    if optimizer is not None:
        remember(optimizer)
    _add_importance(layers, names, configs)
    for name in names:
        if configs[name].is_update(step):
            _update({path: layer for path, layer in layers.items() if layer.is_trained(name)}, name, configs, step)


def _add_importance(layers: Layers, names: list[str], configs: Mapping[str, EpngConfig]) -> None:
    masses = {path: layer.take_mass() for path, layer in layers.items()}
    if rank_and_world()[1] > 1:
        # Added in the order of ranks on each of them, so that all come to the same bits.
        shares = gathered({path: None if mass is None else mass.cpu() for path, mass in masses.items()})
        masses = {path: reduce(_sum, (share[path] for share in shares)) for path in layers}
    for path, layer in layers.items():
        mass = masses[path]
        for name in names:
            if layer.is_trained(name):
                none = torch.zeros(layer.shape.num_experts, dtype=torch.float64)
                layer.add_importance(name, none if mass is None else mass, configs[name].decay)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _update(layers: Layers, name: str, configs: dict[str, Any], step: int) -> None:
    config: EpngConfig = configs[name]
    for layer in layers.values():
        _refuse_sharded(layer)
    if not any(layer.slots_module(name).importance.any() for layer in layers.values()):
        raise SieveError(
            f"an update is due at step {step}, and no routing was counted so far, expected forwards of the model in "
            "training mode before it: pass the model itself, not compiled code, through the training loop"
        )
    moved = {path: layer.allocation(name, config) for path, layer in layers.items()}
    moved = {path: blocks for path, blocks in moved.items() if blocks != layers[path].plan(name).blocks_of}
    tensors = {path: layers[path].tensors_by_row(name) for path in moved}
    # Rank 0's, wherever linear algebra of another machine rounds in another way.
    seed = (config.calib_seed, step)
    new_rows = gathered({path: layers[path].new_rows(name, blocks, seed) for path, blocks in moved.items()})[0]
    for path, blocks in moved.items():
        layers[path].move(name, blocks, new_rows[path], tensors[path], step)
    show_states(configs, name, {path: layers[path].saved_state(name) for path in moved})


def show_states(configs: dict[str, Any], name: str, states: Mapping[str, tuple[RaggedPlan, torch.Tensor]]) -> None:
    """Have an adapter's configuration say what its layers, by path, hold now.

    It becomes an object of its own: the user may begin again with the one that was given, and TRL gives one to two
    adapters.
    """
    configs[name] = copy.copy(configs[name])
    for path, (plan, ledger) in states.items():
        _show_state(configs[name], path, plan, ledger)


def _show_state(config: EpngConfig, path: str, plan: RaggedPlan, ledger: torch.Tensor) -> None:
    if not ledger.numel() and config.expert_blocks is None:
        return
    config.selected_experts = {**(config.selected_experts or {}), path: list(plan.experts)}
    config.expert_blocks = {**(config.expert_blocks or {}), path: list(plan.blocks)}
    config.ledger = {**(config.ledger or {}), path: ledger.tolist()}
    if config.calibration and path in config.calibration.get("coverage", {}):
        # That of experts which are not all there any more.
        coverage = {other: share for other, share in config.calibration["coverage"].items() if other != path}
        config.calibration = {**config.calibration, "coverage": coverage}


def _refuse_sharded(layer: EpngExpertLayer) -> None:
    for parameter in layer.parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param"):
            raise SieveError(
                f"the factors of {layer.path} are sharded over processes (FSDP or DeepSpeed), expected whole ones in "
                "each, since their rows move: train with DistributedDataParallel, or with a SieveLoraConfig"
            )
