"""The way back when LoRA experts were put around the layers of a model, and then their weights turned out wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..common.undo import taken_out_on_error
from .layer import LoraMoeLayer
from .pruning import lora_moe_layers
from .record import RoutingRecord


@contextmanager
def as_before_on_error(model: nn.Module) -> Iterator[None]:
    """When the block ends with an exception, take out the LoRA experts that came into `model` during it.

    Its modules, its other adapters, and what is trainable are as before then, and nothing watches its forwards that did
    not before.
    """
    before = _records(model)
    with taken_out_on_error(model, (LoraMoeLayer,)):
        try:
            yield
        except Exception:
            for record in _records(model) - before:
                record.detach()
            raise


def _records(model: nn.Module) -> set[RoutingRecord]:
    return {layer.record for _, layer in lora_moe_layers(model)}
