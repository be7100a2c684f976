"""Several processes, one mask: share the work of profiling, share errors, and compare results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import torch.distributed as dist

from ..checks import first_line
from ..errors import SieveError
from .profile import RoutingProfile

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where torch.distributed is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: T) -> list[T]:
    """`value` of every process, by rank. Every process must call it."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    with _naming_the_missing():
        dist.all_gather_object(values, value)
    return values


_exchanges = itertools.count()


@contextmanager
def _naming_the_missing() -> Iterator[None]:
    """Around a collective operation: if it fails, the error says which processes have not come to it."""
    rank, world = rank_and_world()
    store, number = dist.distributed_c10d._get_default_store(), next(_exchanges)
    keys = [f"peft_sieve/{number}/{other}" for other in range(world)]
    if store is not None:  # MPI has none
        store.set(keys[rank], "here")
    try:
        yield
    except RuntimeError as error:
        raise SieveError(
            f"Process {rank} of {world} could not compare the selection of experts with {_missing(store, keys)}, which "
            f"stopped or takes too long ({first_line(error)}). The output of the process that stopped first says why."
        ) from error


def _missing(store: Any, keys: list[str]) -> str:
    if store is None:
        return "another process"
    try:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # the process that keeps the store is gone
        missing = [0]
    return f"process {', '.join(map(str, missing))}" if missing else "another process"


def on_every_rank(function: Callable[[], T]) -> T:
    """Run `function` on every process; if it fails on one, all of them raise, so that none waits for it forever.

    Raises:
        SieveError: it failed on another process.
    """
    failure: Exception | None = None
    try:
        value = function()
    except Exception as error:  # shared, then raised again below
        failure = error
    texts = gathered(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise SieveError(f"process {rank} of {len(texts)} failed, so this one stops too; it said: {text}")
    return value


def summed(profile: RoutingProfile) -> RoutingProfile:
    """The sum of every process's profile, the same on each to the bit."""
    return reduce(lambda a, b: a + b, gathered(profile))


def check_agreement(what: str, value: Any) -> None:
    """Refuse to go on with different values.

    Raises:
        SieveError: on every process, naming those that differ from the first.
    """
    values = gathered(value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise SieveError(
            f"processes {different} of {len(values)} hold other {what} than process 0, and training would average "
            "weights of unrelated experts. Give every process the same configuration."
        )
