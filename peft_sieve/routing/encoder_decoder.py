"""What the decoder of an encoder-decoder reads while it is profiled, and which layers are its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import SieveError

IGNORED = -100  # a label that has no loss


def decoder_layers(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Those of the layers at `paths` that read what the decoder reads; none if the model has no encoder."""
    if not is_encoder_decoder(model):
        return set()
    return {path for path in paths if "decoder" in path.split(".")}


def canvas_layers(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Those of the layers at `paths` that read neither the batch's tokens nor its labels, but a block of others, as the
    decoder of a block diffusion model does; none in most models."""
    forward = inspect.signature(model.forward).parameters
    if is_encoder_decoder(model) or "decoder_input_ids" not in forward:
        return set()
    return {path for path in paths if "decoder" in path.split(".")}


def decoder_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Which of the decoder's tokens are real, as the batch or its `labels` say: (batch, length); None without both."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    return (labels != IGNORED).long() if mask is None and labels is not None else mask


def with_decoder_inputs(model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
    """A batch for the model without `labels`, and which of the decoder's tokens are real.

    The decoder reads what it would in training: the labels, moved by one. Text without labels is read on both sides.

    Returns:
        The batch, and a mask like `attention_mask`, (batch, length); None without an encoder, or if all are real.

    Raises:
        SieveError: the model's config does not say with which token its decoder starts.
    """
    mask = decoder_mask(batch)
    batch = dict(batch)
    labels = batch.pop("labels", None)
    if not is_encoder_decoder(model):
        return batch, None
    if any(name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return batch, mask
    if labels is None:
        labels, mask = batch["input_ids"], batch.get("attention_mask") if mask is None else mask
    batch["decoder_input_ids"] = _moved_by_one(labels, model.config)
    return batch, mask


def _moved_by_one(labels: torch.Tensor, config: Any) -> torch.Tensor:
    padding = getattr(config, "pad_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)
    start = padding if start is None else start
    if start is None:
        raise SieveError(
            "the model's config has neither decoder_start_token_id nor pad_token_id, expected one of them to know how "
            "its decoder starts: set it, or profile on batches with decoder_input_ids"
        )
    moved = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), dim=1)
    return moved.masked_fill(moved == IGNORED, start if padding is None else padding)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is one by its config."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
