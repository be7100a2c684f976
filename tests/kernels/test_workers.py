"""Pieces of work in threads of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_sieve.kernels.workers import InOrder, for_each, largest_first


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_piece_once_in_threads_of_one_core_without_gradients() -> None:
    seen: list[tuple[int, int, bool]] = []
    together = threading.Barrier(3)  # passed only if three are under way at once

    def work(index: int) -> None:
        together.wait(timeout=60)
        seen.append((index, torch.get_num_threads(), torch.is_grad_enabled()))

    for_each(work, [1] * 6)
    assert sorted(seen) == [(index, 1, False) for index in range(6)]
    assert torch.get_num_threads() == 3
    assert torch.is_grad_enabled()


def test_the_largest_is_begun_first() -> None:
    torch.set_num_threads(1)
    seen: list[int] = []
    for_each(seen.append, [2, 9, 4])
    assert seen == [1, 2, 0]


def test_sums_do_not_depend_on_who_is_first() -> None:
    """Of numbers that give another sum in another order."""
    values = [torch.tensor([10.0**power, 1.0]) for power in (8, 0, -1, 8, 0)]
    values[3][0] *= -1
    found = []
    for arrival in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 3, 1]):
        target = torch.zeros(2)
        sums = InOrder(largest_first([5, 5, 5, 5, 5]))
        for index in arrival:
            sums.add(index, [(target, values[index])])
        found.append(target.tolist())
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 5


def test_an_error_comes_after_all_other_work_is_done() -> None:
    done: list[int] = []

    def work(index: int) -> None:
        if index == 0:
            raise ValueError("zero")
        done.append(index)

    with pytest.raises(ValueError, match="zero"):
        for_each(work, [9, 1, 1, 1, 1])
    assert sorted(done) == [1, 2, 3, 4]


def test_who_watches_operations_sees_them_all() -> None:
    """A mode, such as a counter of operations, is active in its own thread only."""

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        for_each(lambda index: torch.ones(2).add(1), [1, 1, 1, 1])
    assert count.seen == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_forked_child_has_threads_of_its_own() -> None:
    for_each(lambda index: None, [1, 1, 1])
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        for_each(seen.append, [1, 1, 1])
        os._exit(0 if sorted(seen) == [0, 1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0
