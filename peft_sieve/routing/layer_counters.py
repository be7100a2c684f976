"""Counters of all layers of a model, and the profile that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..moe.topology import MoELayer
from .counting import DispatchCounter, PaddingUnknown, watching
from .data.batches import CalibrationData
from .encoder_decoder import canvas_layers, decoder_layers
from .masks import token_mask
from .profile import RoutingProfile
from .sample_averages import SampleAverages


class RoutingCounters:
    """Counts of all layers over many batches.

    Attributes:
        counters: layer path -> what to feed with the layer's dispatches.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer], advice: str | None = None) -> None:
        self.averages = {layer.path: SampleAverages(layer.num_experts) for layer in layers}
        self._layers = layers
        said = {} if advice is None else {"advice": advice}
        self.counters = {
            layer.path: DispatchCounter(layer.num_experts, averages=self.averages[layer.path], **said)
            for layer in layers
        }
        self._in_decoder = decoder_layers(model, self.counters)
        self._on_canvas = canvas_layers(model, self.counters)

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Count every dispatch of `model` during the block."""
        watched = []
        for layer in self._layers:
            parent, _, name = layer.path.rpartition(".")
            module = model.get_submodule(parent)  # the layer's own `experts` may stand in an adapter layer by now
            watched.append((layer.family, getattr(module, name), module, self.counters[layer.path].add))
        return watching(watched)

    @contextmanager
    def batch(self, batch: Mapping[str, Any], decoder_mask: torch.Tensor | None) -> Iterator[None]:
        """Count what a batch dispatches that is read in the block; after an exception in it, nothing.

        Args:
            batch: with `input_ids`, one sample per row.
            decoder_mask: as `attention_mask`, of the decoder of an encoder-decoder; None if all its tokens are real.

        Raises:
            PaddingUnknown: a layer gets others than the tokens of a batch with padding.
        """
        before = {path: counter.copy() for path, counter in self.counters.items()}
        try:
            self._expect(batch, decoder_mask)
            yield
        except BaseException:
            for path, counter in self.counters.items():
                counter.take(before[path])
                self.averages[path].drop_batch()
            raise
        for sums in self.averages.values():
            sums.end_batch()

    def _expect(self, batch: Mapping[str, Any], decoder_mask: torch.Tensor | None) -> None:
        masks = [_padded(token_mask(mask, batch)) for mask in (batch.get("attention_mask"), decoder_mask)]
        padded = masks[0]
        if self._on_canvas and padded is not None and batch.get("decoder_attention_mask") is None:
            advice = next(iter(self.counters.values())).advice
            raise PaddingUnknown(f"The model's decoder also reads the padding of a batch. {advice}.")
        for path, counter in self.counters.items():
            counter.real = None if path in self._on_canvas else masks[path in self._in_decoder]
            self.averages[path].num_rows = len(batch["input_ids"])

    def profile(self, model: nn.Module, calibration: CalibrationData) -> RoutingProfile:
        """What was counted, while `model` read all of `calibration`."""
        totals = {path: counter.totals() for path, counter in self.counters.items()}
        means = {path: sums.means(calibration.num_samples) for path, sums in self.averages.items()}
        known = {path: pair for path, pair in means.items() if pair is not None}
        complete = len(known) == len(means)
        return RoutingProfile(
            counts={path: counts for path, (counts, _) in totals.items()},
            mass={path: mass for path, (_, mass) in totals.items()},
            num_tokens=calibration.num_tokens,
            num_experts_per_tok=max((counter.top_k for counter in self.counters.values()), default=0) or None,
            sample_share={path: share for path, (share, _) in known.items()} if complete else None,
            sample_mass={path: mass for path, (_, mass) in known.items()} if complete else None,
            num_samples=calibration.num_samples,
            metadata={
                "dataset": calibration.name,
                "fingerprint": calibration.fingerprint,
                "samples": calibration.num_samples,
                "tokens": calibration.num_tokens,
                "model": getattr(model, "name_or_path", "") or type(model).__name__,
            },
        )


def _padded(real: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens are real; None, too, if all are: here nobody minds waiting for the device."""
    return None if real is None or bool(real.all()) else real
