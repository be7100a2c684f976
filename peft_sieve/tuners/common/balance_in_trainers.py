"""The balance loss where a trainer makes its loss from log-probabilities: added to what `compute_loss` returns.

As TRL's trainers add that of the model's own routers: a mean over each batch, averaged over the batches of an optimizer
step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .balance import BalanceLoss
from .tuner import MethodTuner


class BalancedTuner(MethodTuner):
    """A tuner whose adapters have routers with a balance loss."""

    def train(self, mode: bool = True) -> BalancedTuner:
        """As PyTorch's. Trainers call it before every step, by when TRL's is there to be told of the balance loss."""
        if mode:
            _wrap_sft_trainer()
        return super().train(mode)

    def auxiliary_loss(self) -> torch.Tensor | None:
        """The balance loss of the last training forward, coefficients included: a scalar; None if there was none."""
        balance = BalanceLoss.of(self.model)
        return None if balance is None else balance.last_loss()

    def unload(self) -> Any:
        """The base model without adapters."""
        BalanceLoss.remove_from(self.model)
        return super().unload()


def _wrap_sft_trainer() -> None:
    """Have `SFTTrainer` add the balance loss of the model it trains; nothing if TRL is not in use. Once is enough.

    It has no hook for losses that are added to its own.
    """
    trainer = getattr(sys.modules.get("trl.trainer.sft_trainer"), "SFTTrainer", None)
    if trainer is None or hasattr(trainer.compute_loss, "_peft_sieve_original"):
        return
    original = trainer.compute_loss

    @wraps(original)
    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return loss_with_balance(self, lambda *a, **k: original(self, *a, **k), model, *args, **kwargs)

    compute_loss._peft_sieve_original = original  # type: ignore[attr-defined]
    trainer.compute_loss = compute_loss


def loss_with_balance(trainer: Any, compute_loss: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """What a trainer's `compute_loss` returns, with the balance loss of its model's adapters.

    Called within itself (a trainer that is derived from a wrapped one), the outermost call adds it.

    Args:
        args, kwargs: of `compute_loss` behind the model.
    """
    base = trainer.accelerator.unwrap_model(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    balance = BalanceLoss.of(base)
    if balance is None or not balance.adds_to_outputs:
        return compute_loss(model, *args, **kwargs)
    with balance.added_elsewhere():
        result = compute_loss(model, *args, **kwargs)
    if not model.training or not balance.trains:
        return result
    loss = result[0] if isinstance(result, tuple) else result
    added = balance.last_loss()
    assert added is not None
    loss = loss + added.to(loss) / _batches_to_add_up(trainer, kwargs.get("num_items_in_batch"))
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def _batches_to_add_up(trainer: Any, num_items_in_batch: Any) -> int:
    """Over how many batches a trainer adds up what `compute_loss` returns; 1 if it averages."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_model or trainer.compute_loss_func is not None
    return trainer.current_gradient_accumulation_steps if scaled else 1
