"""Put something around a method of one Trainer, for as long as it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import Trainer


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
