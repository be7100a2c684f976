"""How much memory a step needs at its peak.

On CUDA the allocator says so. On the CPU every tensor's storage is counted while it lives; what an operation needs
inside itself is not seen there, nor are arrays of numpy.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from methods import is_expert
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of storages: those it is shown, and those of what is computed while it is active.

    A backward on the CPU runs in the thread that asks for it, so its operations are seen.

    Attributes:
        live, peak: bytes now, and at most.
        operations: names of those seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operations: set[str] = set()
        self._sizes: dict[int, int] = {}

    def track(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            # The object lives as long as the memory: views and autograd's saved tensors share it.
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.add(func.__name__)
        self.track(tree_leaves(out))
        return out


def peak_bytes(
    step: Callable[[], None], model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> int:
    """The most that is allocated at once during a step: model, optimizer and batch, and what the step itself needs.

    The optimizer should have its states already: make a step before.
    """
    gc.collect()
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    meter = StorageMeter()
    meter.track(itertools.chain(model.parameters(), model.buffers(), batch.values()))
    meter.track(tree_leaves([list(state.values()) for state in optimizer.state.values()]))
    with meter:
        step()
    return meter.peak


def adapter_bytes(model: nn.Module) -> int:
    """What the adapters of experts cannot do without: parameters, gradients and Adam's two states, of one type."""
    trained = (p for name, p in model.named_parameters() if p.requires_grad and is_expert(name))
    return sum(4 * p.nbytes for p in trained)
