"""Count what the routers of adapted layers dispatch in training forwards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...routing.counting import DispatchCounter, Watched, see_mask, watching
from ...routing.encoder_decoder import canvas_layers, decoder_layers
from .experts.layer import SieveExpertLayer
from .forwards import TrainingForwards


class Traffic(TrainingForwards):
    """Feeds a counter for each adapted layer with the real tokens of training forwards: derive from it.

    Args:
        model: the base model.
        layer_type: which adapter layers are watched.
    """

    def __init__(self, model: nn.Module, layer_type: type[SieveExpertLayer]) -> None:
        super().__init__()
        self.layers = [
            (module, child)
            for module in model.modules()
            for child in module.children()
            if isinstance(child, layer_type)
        ]
        paths = [layer.path for _, layer in self.layers]
        self.in_decoder, self.on_canvas = decoder_layers(model, paths), canvas_layers(model, paths)
        self._open: ExitStack | None = None

    def counter(self, layer: Any) -> DispatchCounter:
        """The one that counts for a layer now."""
        raise NotImplementedError

    def counts(self, layer: Any) -> bool:
        """Whether what is dispatched to a layer counts now."""
        raise NotImplementedError

    def begin(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        self._open = ExitStack()
        self._open.enter_context(watching(self._watched(parent, layer) for parent, layer in self.layers))
        self._see_mask(given, given_by_user=True)

    def inside(self, given: Mapping[str, Any]) -> None:
        if self._open is not None:
            self._see_mask(given, given_by_user=False)

    def end(self, model: nn.Module, given: Mapping[str, Any], output: Any) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _see_mask(self, batch: Mapping[str, Any], given_by_user: bool) -> None:
        # What the model is given counts; what it hands on inside may have been turned into one mask per query.
        counters = {layer.path: self.counter(layer) for _, layer in self.layers if layer.path not in self.on_canvas}
        see_mask(counters, self.in_decoder, batch, given_by_user)

    def _watched(self, parent: nn.Module, layer: SieveExpertLayer) -> Watched:
        def on_dispatch(expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
            if self.counts(layer):
                self.counter(layer).add(expert_ids, expert_weights)

        return layer.family, layer, parent, on_dispatch
