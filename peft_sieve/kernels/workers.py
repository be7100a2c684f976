"""Independent pieces of work on the CPU, a thread each, in place of operations that are each split over all threads.

PyTorch divides one operation at a time among its threads and waits for the last of them before the next. Experts are
thousands of short operations a step, and where the cores have other work, too, each such wait can last as long as the
scheduler lets that run. A thread that takes a piece through all its operations by itself waits for nobody.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
# A child process has the parent's memory, but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def for_each(work: Callable[[int], None], sizes: Sequence[int]) -> None:
    """Call `work` with each index of `sizes`, without gradients; in several threads where that helps.

    The calls must not depend on each other. In what order they come is open.

    Args:
        sizes: how much each call has to do; the largest ones are begun first.
    """
    order = iter(largest_first(sizes))
    threads = min(torch.get_num_threads(), len(sizes))
    if threads < 2 or not _may_divide():
        _take(work, order)
        return
    running = [_pool(torch.get_num_threads()).submit(_take, work, order) for _ in range(threads)]
    # All of them, also after an error: what they work on belongs to the caller.
    errors = [error for future in running if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def largest_first(sizes: Sequence[int]) -> list[int]:
    """The order in which `for_each` begins its calls."""
    return sorted(range(len(sizes)), key=lambda i: -sizes[i])


class InOrder:
    """Sums to which several threads add, always in one order: equal inputs give equal bits.

    Args:
        order: of the calls of `add`, each index once. What comes early waits, which is little if calls are begun in
            this order.
    """

    def __init__(self, order: Iterable[int]) -> None:
        self._order = iter(order)
        self._next = next(self._order, None)
        self._waiting: dict[int, Sequence[tuple[Tensor, Tensor]]] = {}
        self._lock = threading.Lock()

    def add(self, index: int, additions: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add to tensors: (where to, what) for each."""
        with self._lock:
            self._waiting[index] = additions
            while self._next in self._waiting:
                for target, value in self._waiting.pop(self._next):
                    target.add_(value)
                self._next = next(self._order, None)


@torch.no_grad()
def _take(work: Callable[[int], None], order: Iterator[int]) -> None:
    for index in order:
        work(index)


def _may_divide() -> bool:
    """Whether a thread can be kept to one core, and nobody looks on who would see the operations of one thread only."""
    watched = is_in_torch_dispatch_mode() or torch.autograd._profiler_enabled()
    return not watched and _set_openmp_threads() is not None


@cache
def _set_openmp_threads() -> Callable[[int], None] | None:
    """OpenMP's setting of the calling thread, where PyTorch brought OpenMP along.

    Not `torch.set_num_threads`: that also tells MKL, for the whole process, to split small products as much as large
    ones, which makes a training step a tenth slower.
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        return ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):
        return None


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(
                threads, thread_name_prefix="peft_sieve", initializer=_keep_to_one_core
            )
        return _pools[threads]


def _keep_to_one_core() -> None:
    torch.get_num_threads()  # PyTorch sets the number when a thread first asks for it; so ask before setting another
    set_threads = _set_openmp_threads()
    assert set_threads is not None
    set_threads(1)
    if (set_mkl_threads := _set_mkl_threads()) is not None:
        set_mkl_threads(1)


@cache
def _set_mkl_threads() -> Callable[[int], int] | None:
    """MKL's setting of the calling thread, where PyTorch has MKL inside.

    Once a program calls `torch.set_num_threads`, MKL no longer asks OpenMP: then it splits products in every thread.
    """
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    try:
        # Loaded already: this finds it, and loads nothing.
        return ctypes.CDLL(os.path.join(folder, "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    except (AttributeError, OSError):
        return None
