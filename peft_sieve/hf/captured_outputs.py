"""What transformers records while a model runs, such as router logits, when a layer is run in parts.

transformers keeps one list for each kind of output, and hooks on the modules append to it. A router that runs once for
each adapter of a mixed batch would append once for each of them, and whoever reads the list counts one entry a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils.output_capturing import _active_collector  # no public name leads there


@contextmanager
def apart() -> Iterator[dict[str, list[Any]]]:
    """What is recorded in the block goes to the lists that this gives, and not to those of the forward."""
    running = _active_collector.get()
    part: dict[str, list[Any]] = {name: [] for name, values in (running or {}).items() if isinstance(values, list)}
    if running is None:
        yield part
        return
    token = _active_collector.set({**running, **part})
    try:
        yield part
    finally:
        _active_collector.reset(token)


def add(outputs: Mapping[str, list[Any]]) -> None:
    """Record what was recorded apart, put together."""
    running = _active_collector.get()
    for name, values in outputs.items():
        running[name] += values
