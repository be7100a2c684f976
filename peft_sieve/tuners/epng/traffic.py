"""Count what the routers dispatch in forwards of training: hooks on the model that last as long as its adapters."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...routing.counting import Watched, see_mask, watching
from ...routing.encoder_decoder import decoder_layers
from ..common.hooks import hang
from .layer import EpngExpertLayer

_TRAFFIC = "traffic"


class Traffic:
    """Feeds the counters of a model's adapter layers.

    What counts: the real tokens of a forward in training mode that keeps gradients, once, with the adapter on. So not
    padding, not evaluation or generation, not a reference model's forward, and not what gradient checkpointing
    computes again, which happens in the backward, outside of any forward of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            (module, child)
            for module in model.modules()
            for child in module.children()
            if isinstance(child, EpngExpertLayer)
        ]
        self.in_decoder = decoder_layers(model, [layer.path for _, layer in self.layers])
        self._depth = 0
        self._open: ExitStack | None = None

    def hang_on(self, model: nn.Module) -> None:
        """Count from now on, in the place of another that hung there."""
        # Losses that never make logits call the backbone alone.
        backbone = getattr(model, "base_model", model)
        for module in {id(m): m for m in (model, backbone)}.values():
            before = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            after = module.register_forward_hook(self._end, always_call=True)
            hang(module, _TRAFFIC, before, after)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._depth += 1
        given = self._depth == 1
        if given and module.training and torch.is_grad_enabled():
            self._open = ExitStack()
            self._open.enter_context(watching(self._watched(parent, layer) for parent, layer in self.layers))
        if self._open is not None:
            see_mask({layer.path: layer.traffic for _, layer in self.layers}, self.in_decoder, kwargs, given)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._open is not None:
            self._open.close()
            self._open = None

    def _watched(self, parent: nn.Module, layer: EpngExpertLayer) -> Watched:
        def on_dispatch(expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
            if not layer.disable_adapters and any(layer.is_trained(name) for name in layer.active_adapters):
                layer.traffic.add(expert_ids, expert_weights)

        return layer.family, layer, parent, on_dispatch
