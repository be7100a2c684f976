"""What EPnG counts: the traffic of layers with an adapter that is being trained."""

from __future__ import annotations

from torch import nn

from ...routing.counting import DispatchCounter
from ..common.traffic import Traffic
from .layer import EpngExpertLayer


class EpngTraffic(Traffic):
    """Feeds the counters that the layers hold, from now on and in the place of another that hung there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, EpngExpertLayer)
        self.hang_on(model, "traffic")

    def counter(self, layer: EpngExpertLayer) -> DispatchCounter:
        return layer.traffic

    def counts(self, layer: EpngExpertLayer) -> bool:
        # Off in a reference model's forward.
        return not layer.disable_adapters and any(layer.is_trained(name) for name in layer.active_adapters)
