"""Hooks that adapters hang on modules of the base model, under names, so that they can be taken down with them.

They hang there, not on the tuner: transformers' `add_adapter` keeps the layers and drops the tuner.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ATTRIBUTE = "_sieve_hooks"


def hang(module: nn.Module, name: str, *handles: Any) -> None:
    """Remember the handles of hooks on `module`, and remove those of this name from before."""
    take_down(module, name)
    vars(module).setdefault(_ATTRIBUTE, {})[name] = handles


def take_down(module: nn.Module, name: str | None = None) -> None:
    """Remove the hooks of this name from `module`, or all of them; nothing if there are none."""
    held: dict[str, tuple[Any, ...]] = vars(module).get(_ATTRIBUTE, {})
    for found in list(held) if name is None else [name]:
        for handle in held.pop(found, ()):
            handle.remove()
    if not held:
        vars(module).pop(_ATTRIBUTE, None)
