"""What the experts of a model received, read from their calls alone: the profile is compared with this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Counts = dict[str, torch.Tensor]


@contextmanager
def recounted(model: nn.Module, num_experts: dict[str, int]) -> Iterator[Counts]:
    """Count what each expert gets in the forwards inside the block.

    Args:
        num_experts: path of an experts module -> how many it has.

    Yields:
        path -> tokens of each expert, (num_experts,).
    """
    counts = {path: torch.zeros(number, dtype=torch.int64) for path, number in num_experts.items()}
    changed: list[nn.Module] = []
    try:
        for path, count in counts.items():
            experts = model.get_submodule(path)
            listed = list(_unwrapped(experts).children())
            if len(listed) == len(count) and isinstance(_unwrapped(experts), nn.ModuleList | nn.ModuleDict):
                for index, expert in enumerate(listed):
                    _count_rows(expert, count, index)
                    changed.append(expert)
            else:
                _count_call(experts, count)
                changed.append(experts)
        yield counts
    finally:
        for module in changed:
            del module.forward


def _unwrapped(module: Any) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _count_rows(expert: nn.Module, count: torch.Tensor, index: int) -> None:
    """An expert that is a module by itself: the rows it is called with."""
    forward = expert.forward

    def counting(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count[index] += x.numel() // x.shape[-1]
        return forward(x, *args, **kwargs)

    expert.forward = counting  # type: ignore[method-assign]


def _count_call(experts: nn.Module, count: torch.Tensor) -> None:
    """Experts in one module: by the ids, the sizes or the rows that it is called with."""
    forward = experts.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        count.add_(_received([*args, *kwargs.values()], len(count)))
        return forward(*args, **kwargs)

    experts.forward = counting  # type: ignore[method-assign]


def _received(arguments: list[Any], num_experts: int) -> torch.Tensor:
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    for ids in tensors:
        if not ids.is_floating_point() and ids.dim() == 2:
            weights = next(t for t in tensors if t.is_floating_point() and t.shape == ids.shape)
            # One at a time. Ids beyond the experts belong to none; a pair of weight zero is one that was not sent.
            received = torch.zeros(num_experts, dtype=torch.int64)
            for expert, weight in zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True):
                received[expert : expert + 1] += weight != 0
            return received
    for sizes in arguments:
        if isinstance(sizes, list) and len(sizes) == num_experts:
            return torch.tensor(sizes)
    # Each expert has a row for every token, of zeros unless the token was sent to it.
    rows = tensors[0].view(num_experts, -1, tensors[0].shape[-1])
    return (rows != 0).any(-1).sum(1)
