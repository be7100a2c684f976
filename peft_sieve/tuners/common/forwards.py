"""What a forward of a model was given, for losses that are added to the one that the model makes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ...routing.encoder_decoder import IGNORED


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def share_of_step(model: nn.Module, given: Mapping[str, Any]) -> torch.Tensor | float:
    """The part of the labels of an optimizer step that this forward has: of all its batches together 1.

    transformers' Trainer passes `num_items_in_batch`, the labels of all batches, for losses that are to be added up
    over them. Without it a loss is a mean, and the share is 1.

    Args:
        given: the arguments of the forward by name.
    """
    total, labels = given.get("num_items_in_batch"), given.get("shift_labels")
    if labels is None:
        labels = given.get("labels")
        if isinstance(labels, torch.Tensor) and _shifts_labels(model):
            labels = labels[..., 1:]
    if total is None or not isinstance(labels, torch.Tensor):
        return 1.0
    return labels.ne(IGNORED).sum() / torch.as_tensor(total, device=labels.device).clamp(min=1)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the first label of a sequence has no loss, by the Trainer's rule, which counts the others only."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
