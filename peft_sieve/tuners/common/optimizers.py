"""The optimizers that are in use, so that what they keep for a parameter can go where the parameter goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

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


def states(parameter: nn.Parameter) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
    """Each optimizer that keeps something for a parameter, and what it keeps."""
    for optimizer in _known:
        # By get: the mapping makes an entry for whatever is asked for in brackets.
        if state := optimizer.state.get(parameter):
            yield optimizer, state


def forget(parameter: nn.Parameter) -> bool:
    """Have optimizers begin anew for a parameter that holds something else now; whether one does."""
    holders = [optimizer for optimizer, _ in states(parameter)]
    for optimizer in holders:
        optimizer.state.pop(parameter)
    return bool(holders)
