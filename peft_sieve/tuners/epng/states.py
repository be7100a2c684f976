"""What optimizers keep for each row of a parameter goes where the row goes."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...errors import SieveError

_known: WeakSet[Optimizer] = WeakSet()
_hooked = False


def remember_optimizers() -> None:
    """From now on, know every optimizer that takes a step, so that a training loop need not name it."""
    global _hooked
    if not _hooked:
        register_optimizer_step_post_hook(_remember)
        _hooked = True


def _remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _known.add(optimizer)


def remember(optimizer: Any) -> None:
    """Know an optimizer, or the one in accelerate's wrapper, that may not have taken a step."""
    _known.add(getattr(optimizer, "optimizer", optimizer))


def tensors_by_row(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """The tensors that have a row for each of the parameter's: itself, its gradient, and the states of optimizers.

    Raises:
        SieveError: an optimizer's state has another form, whose rows cannot be told.
    """
    found = [parameter.data]
    if parameter.grad is not None:
        found.append(parameter.grad)
    for optimizer in _known:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor) or value.numel() == 1:
                continue  # a count of steps and the like
            if value.shape != parameter.shape or not value.is_floating_point():
                raise SieveError(
                    f"{type(optimizer).__name__} keeps {name} of shape {tuple(value.shape)} and type {value.dtype} for "
                    f"a factor of shape {tuple(parameter.shape)}, expected floating-point states of its shape, whose "
                    "rows can follow those of the factor: train with AdamW, SGD or another that keeps such"
                )
            found.append(value)
    return found
