"""Processes that were connected only after their masks were made compare them at the first training forward.

The check hangs on the base model, not on the tuner: transformers' `add_adapter` keeps the layers and drops the tuner.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...routing.distributed import check_agreement, rank_and_world
from .loading import sieve_layers


def check_at_next_training_forward(model: nn.Module) -> None:
    """Have processes compare their masks once more: they may be connected only after the masks were made."""
    stop_checking(model)
    vars(model)["_sieve_check"] = model.register_forward_pre_hook(_check_processes_agree)


def stop_checking(model: nn.Module) -> None:
    handle = vars(model).pop("_sieve_check", None)
    if handle is not None:
        handle.remove()


def _check_processes_agree(model: nn.Module, args: tuple[Any, ...]) -> None:
    if not model.training or rank_and_world()[1] == 1:
        return
    masks = {path: {name: plan.experts for name, plan in layer.plans.items()} for path, layer in sieve_layers(model)}
    check_agreement("selected experts", masks)
    stop_checking(model)
