"""Take rows or columns out of parameters, and with them out of what an optimizer keeps for them.

The parameters stay the same objects, so that whoever holds them (an optimizer's groups, a wrapper around it, a list for
gradient clipping) goes on with the smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import SieveError


@dataclass(frozen=True)
class Cut:
    """What is left of one parameter.

    Attributes:
        name: for errors.
        parameter: to be cut.
        dim: the dimension that gets shorter.
        index: int64, the positions along it that stay, in order.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: torch.Tensor

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of a tensor of the parameter's shape: memory of its own, the rest can be freed."""
        return tensor.detach().index_select(self.dim, self.index.to(tensor.device))


def check_cuttable(cuts: Sequence[Cut], optimizer: Any) -> None:
    """Refuse an optimizer whose states do not follow their parameters element by element.

    Args:
        optimizer: of torch, or a wrapper with its `param_groups` and `state`, such as accelerate's.

    Raises:
        SieveError: and nothing was changed.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [cut.name for cut in cuts if id(cut.parameter) not in held]
    if missing:
        raise SieveError(
            f"the optimizer holds no {missing[0]} ({len(missing)} parameters that are to be pruned are missing), "
            "expected the one that trains the adapter: pass that optimizer"
        )
    for cut in cuts:
        for key, value in _state(optimizer, cut.parameter).items():
            fits = isinstance(value, torch.Tensor) and (value.shape == cut.parameter.shape or value.numel() == 1)
            if not fits and not isinstance(value, int | float | str | None):
                raise SieveError(
                    f"the optimizer, a {type(optimizer).__name__}, keeps {key!r} for {cut.name} in another shape than "
                    "the parameter's, expected states that can be cut with it: use AdamW, Adam or SGD of torch"
                )


def cut(cuts: Sequence[Cut], optimizer: Any | None) -> None:
    """Cut parameters, their gradients and their optimizer states, which `check_cuttable` has accepted."""
    for c in cuts:
        shape = c.parameter.shape
        state = {} if optimizer is None else _state(optimizer, c.parameter)
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == shape:
                state[key] = c.of(value)
        gradient = c.parameter.grad
        replace_data(c.parameter, c.of(c.parameter))
        c.parameter.grad = None if gradient is None else c.of(gradient)


def replace_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter data of another shape; its gradient is dropped.

    A graph that somebody still holds (the loss of the step before) keeps the node alive that adds up the parameter's
    gradient, and with it the old shape. Going through another type makes torch drop that node.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def _state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    # By get: the mapping makes an entry for whatever is asked for in brackets.
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    return state
