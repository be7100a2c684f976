"""Calibration data that come as batches which are ready for the model: dicts with 2-D `input_ids`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import must_be
from ...errors import SieveError
from .batch_values import check_values


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
            batch = _first_rows(_as_inputs(item, where), missing)
            if batch["input_ids"].numel() == 0:
                continue
            taken.append(batch)
            missing -= len(batch["input_ids"])
            if missing <= 0:
                break
        return taken


def used_ids(batch: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of each row that are not padding. A mask per query, as for packed samples, says nothing of it."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return batch["input_ids"].tolist()
    return [ids[kept].tolist() for ids, kept in zip(batch["input_ids"], mask != 0, strict=True)]


def _as_inputs(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A batch of its own for the CPU; tensors that are there already are shared, never written to."""
    batch = {
        key: torch.as_tensor(value).detach().cpu() if isinstance(value, Tensor | np.ndarray) else value
        for key, value in item.items()
    }
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
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape != input_ids.shape:
            shapes = f"{tuple(mask.shape)} and `input_ids` the shape {tuple(input_ids.shape)}"
            raise SieveError(f"`attention_mask` of {where} has the shape {shapes}. They must be the same.")
        batch["attention_mask"] = mask.to(torch.int64)
    return batch


def _first_rows(batch: dict[str, Any], limit: int) -> dict[str, Any]:
    """Trims a batch to `limit` rows, or leaves it whole if one of its inputs is not laid out by rows."""
    rows = len(batch["input_ids"])
    if rows <= limit:
        return batch
    trimmed = {}
    for key, value in batch.items():
        if not isinstance(value, Tensor | list | tuple) or (isinstance(value, Tensor) and value.ndim == 0):
            trimmed[key] = value
        elif key == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
            trimmed[key] = value[:, :limit]  # (3, batch, seq): time, height, width
        elif key == "position_ids" and len(value) == 1:  # (1, seq): the same for all rows
            trimmed[key] = value
        elif len(value) == rows:
            trimmed[key] = value[:limit]
        else:
            return batch
    return trimmed
