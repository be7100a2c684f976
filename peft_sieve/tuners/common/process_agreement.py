"""Processes that were connected only after their masks were made compare them at the first training forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...routing.distributed import check_agreement, rank_and_world
from .hooks import hang, take_down
from .loading import sieve_layers

_CHECK = "check"


def check_at_next_training_forward(model: nn.Module) -> None:
    """Have processes compare their masks once more: they may be connected only after the masks were made."""
    hang(model, _CHECK, model.register_forward_pre_hook(_check_processes_agree))


def _check_processes_agree(model: nn.Module, args: tuple[Any, ...]) -> None:
    if not model.training or rank_and_world()[1] == 1:
        return
    check_agreement("selected experts", {path: dict(layer.plans) for path, layer in sieve_layers(model)})
    take_down(model, _CHECK)
