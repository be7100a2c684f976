"""Processes that were connected only after their masks were made compare them at the first training forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...routing.distributed import check_agreement, rank_and_world
from .experts.layer import expert_layers
from .forwards import TrainingForwards

_NAME = "agreement"


class ProcessAgreement(TrainingForwards):
    """Compares the adapters' plans of all processes once, as soon as there are several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.hang_on(model, _NAME)

    def begin(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        if rank_and_world()[1] > 1:
            plans = {path: dict(layer.plans) for path, layer in expert_layers(self.model)}
            experts = {path: {name: plan.experts for name, plan in held.items()} for path, held in plans.items()}
            check_agreement("selected experts", experts)
            check_agreement("settings of the experts' adapters", plans)
            self.take_off(self.model, _NAME)
