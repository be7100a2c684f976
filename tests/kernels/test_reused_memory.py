"""Memory that is used again."""

from __future__ import annotations

import threading

import torch

from peft_sieve.kernels.reused_memory import scratch

CPU = torch.device("cpu")


def test_the_same_memory_again_unless_it_is_too_small() -> None:
    first = scratch((4, 8), torch.float32, CPU)
    again = scratch((8, 8), torch.bfloat16, CPU)
    assert again.data_ptr() == first.data_ptr()
    assert (again.shape, again.dtype) == ((8, 8), torch.bfloat16)
    larger = scratch((1024, 1024), torch.float64, CPU)
    assert larger.shape == (1024, 1024)
    assert scratch((4, 8), torch.float32, CPU).data_ptr() == larger.data_ptr()


def test_threads_do_not_share_it() -> None:
    mine = scratch((4,), torch.float32, CPU).data_ptr()
    others: list[int] = []
    keep = []

    def ask() -> None:
        keep.append(scratch((4,), torch.float32, CPU))
        others.append(keep[0].data_ptr())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert others != [mine]
