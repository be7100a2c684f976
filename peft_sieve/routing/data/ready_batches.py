"""Calibration data that come as batches which are ready for the model: dicts with 2-D `input_ids`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import must_be
from ..masks import check_readable, token_mask
from .batch_values import check_values
from .cutting import part_of
from .packed import separated


def is_model_batch(item: Any) -> bool:
    """Whether `item` is a mapping with 2-D `input_ids`, shape `(batch, seq)`."""
    if not isinstance(item, Mapping):
        return False
    input_ids = item.get("input_ids")
    return isinstance(input_ids, Tensor | np.ndarray) and input_ids.ndim == 2


@dataclass(frozen=True)
class ModelBatches:
    """An iterable whose items are ready for the model; unread so far."""

    name: str
    batches: Iterable[Any]

    def take(self, max_samples: int) -> list[dict[str, Any]]:
        """The first batches, as CPU tensors, until they cover `max_samples` rows; those without a token are left out.
        Packed rows come as their samples.

        Raises:
            SieveError: one is not such a batch.
        """
        taken: list[dict[str, Any]] = []
        missing = max_samples
        for position, item in enumerate(self.batches):
            where = f"item {position} of the calibration data"
            check_values(item, where)
            if not is_model_batch(item):
                raise must_be(where, "a dict with 2-D `input_ids` like those before it", item)
            for part in separated(_as_inputs(item, where), where):
                if missing > 0 and part["input_ids"].numel() > 0:
                    # Whole, if one of its inputs is not laid out by rows.
                    taken.append(part_of(part, slice(missing)) or part)
                    missing -= len(taken[-1]["input_ids"])
            if missing <= 0:
                break
        return taken


def used_ids(batch: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of each row that are not padding."""
    input_ids, real = batch["input_ids"], token_mask(batch.get("attention_mask"), batch)
    if real is None:
        return input_ids.tolist()
    return [ids[kept].tolist() for ids, kept in zip(input_ids, real.view_as(input_ids), strict=True)]


def _as_inputs(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A batch of its own for the CPU; tensors that are there already are shared, never written to."""
    batch = {key: _on_cpu(value) for key, value in item.items()}
    if batch["input_ids"].is_floating_point():
        raise must_be(f"`input_ids` of {where}", "integers", batch["input_ids"].dtype)
    input_ids = batch["input_ids"] = batch["input_ids"].to(torch.int64)
    if input_ids.numel() and int(input_ids.min()) < 0:
        raise must_be(f"`input_ids` of {where}", "at least 0", int(input_ids.min()))
    mask = batch.get("attention_mask")
    if mask is None:
        batch.pop("attention_mask", None)
        # With positions of their own, packed samples are told apart only while there is no mask.
        if "position_ids" not in batch:
            batch["attention_mask"] = torch.ones_like(input_ids)
    else:
        check_readable(mask, tuple(input_ids.shape), f"`attention_mask` of {where}")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            batch["attention_mask"] = mask.to(torch.int64)
    of_decoder, decoder_ids = batch.get("decoder_attention_mask"), batch.get("decoder_input_ids")
    # One of two dimensions may be longer, and tell which of the encoder's tokens are seen.
    if isinstance(decoder_ids, Tensor) and not (isinstance(of_decoder, Tensor) and of_decoder.ndim == 2):
        name = f"`decoder_attention_mask` of {where}"
        check_readable(of_decoder, tuple(decoder_ids.shape), name, "decoder_input_ids")
    return batch


def _on_cpu(value: Any) -> Any:
    """A tensor there, also those of masks for kinds of layers."""
    if type(value) is dict:
        return {key: _on_cpu(item) for key, item in value.items()}
    return torch.as_tensor(value).detach().cpu() if isinstance(value, Tensor | np.ndarray) else value
