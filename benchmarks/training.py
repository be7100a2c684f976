"""One step of training, as it is timed and weighed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def training_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A function that makes one step on the batch, and its optimizer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A small rate: the router is trained too, and the routing must stay what it was said to be.
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step() -> None:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        # At the end, not at the beginning: models take turns, and none should hold gradients while it waits.
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer
