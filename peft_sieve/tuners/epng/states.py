"""What optimizers keep for each row of a parameter goes where the row goes."""

from __future__ import annotations

import torch

from ...errors import SieveError
from ..common.optimizers import states


def tensors_by_row(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """The tensors that have a row for each of the parameter's: itself, its gradient, and the states of optimizers.

    Raises:
        SieveError: an optimizer's state has another form, whose rows cannot be told.
    """
    found = [parameter.data]
    if parameter.grad is not None:
        found.append(parameter.grad)
    for optimizer, state in states(parameter):
        for name, value in state.items():
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
