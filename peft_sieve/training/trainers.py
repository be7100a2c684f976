"""What callbacks have in common: checks of their Trainer, and methods of it that are wrapped while it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from ..errors import SieveError


def wrap_method(trainer: Trainer, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Put `wrapper`, called with the method before the arguments, around a method of this trainer alone.

    Returns:
        A function that gives the method back.
    """
    method = getattr(trainer, name)
    before = vars(trainer).get(name)
    setattr(trainer, name, functools.wraps(method)(functools.partial(wrapper, method)))

    def restore() -> None:
        if before is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, before)

    return restore


def check_trainer(callback: Any, trainer: Any) -> None:
    """Raise `SieveError` unless a callback was made with a Trainer."""
    if not isinstance(trainer, Trainer):
        name = type(callback).__name__
        raise SieveError(
            f"{name} needs a Trainer of transformers or TRL, got a {type(trainer).__name__}. Make it first, then "
            f"trainer.add_callback({name}(trainer))."
        )


def check_same_trainer(callback: Any, state: Any) -> None:
    """Raise `SieveError` if a callback was added to another trainer than it was made with."""
    if callback.trainer.state is not state:
        name = type(callback).__name__
        raise SieveError(
            f"{name} was added to another trainer than it was made with. Use trainer.add_callback({name}(trainer))."
        )


def check_hooks_see(args: Any, name: str) -> None:
    """Raise `SieveError` if training runs in a way in which hooks do not see the routing.

    Args:
        args: of the trainer.
        name: of the callback that counts.
    """
    if args.torch_compile:
        raise SieveError(
            f"torch_compile=True is not supported by {name}: compiled code passes by the hooks that count the routing. "
            "Leave one of them out."
        )
    if args.n_gpu > 1:
        raise SieveError(
            f"The trainer spreads one process over {args.n_gpu} GPUs, where copies of a layer would count at once. "
            "Start one process for each (accelerate launch or torchrun), or show it one GPU."
        )
