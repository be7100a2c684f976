"""A batch that the model cannot read, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import DistError

from ..checks import one_line
from ..errors import SieveError, out_of_memory
from .distributed import rank_and_world

# What wrong names, types, shapes and values of inputs lead to.
_OF_INPUTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_OF_MACHINES = (torch.AcceleratorError, DistError, NotImplementedError)


@contextmanager
def naming_inputs(batch: Mapping[str, Any], read: Callable[[dict[str, torch.Tensor]], Any]) -> Iterator[None]:
    """Around a forward: what the model raises because of its inputs becomes a `SieveError` with their names and shapes.

    Errors that the inputs are not to blame for pass: memory runs out, a device or another process fails, or the model
    cannot read plain tokens either.

    Args:
        batch: the inputs.
        read: runs the same forward on a batch of `input_ids` and `attention_mask`.

    Raises:
        SieveError: the model rejects the batch.
    """
    try:
        yield
    except _OF_INPUTS as error:
        ours = isinstance(error, (SieveError, *_OF_MACHINES)) or out_of_memory(error)
        if ours or not _reads_plain_tokens(read):
            raise
        inputs = ", ".join(f"`{name}` {_described(value)}" for name, value in batch.items())
        raise SieveError(
            f"The model rejects a calibration batch of {inputs}. {type(error).__name__}: {one_line(error)}."
        ) from error


def _reads_plain_tokens(read: Callable[[dict[str, torch.Tensor]], Any]) -> bool:
    """Whether the model reads two tokens."""
    if rank_and_world()[1] > 1:
        return True  # the others may not join in a forward
    ids = torch.zeros((1, 2), dtype=torch.int64)
    try:
        read({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    except _OF_INPUTS:
        return False
    return True


def _described(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"({type(value).__name__})"
