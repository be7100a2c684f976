"""TRL's `SFTTrainer` makes its loss from log-probabilities: the balance loss of adapters is added there.

As it adds that of the model's own routers: a mean over each batch, averaged over the batches of an optimizer step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..perft.balance import added_by_trainer, auxiliary_loss, collected_by


def add_to_sft_loss() -> None:
    """Have `SFTTrainer` add the balance loss of the model it trains; nothing if TRL is not in use. Once is enough."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    trainer = getattr(module, "SFTTrainer", None)
    if trainer is None or hasattr(trainer.compute_loss, "_peft_sieve_original"):
        return
    original = trainer.compute_loss

    @wraps(original)
    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return _compute_loss(original, self, model, inputs, *args, **kwargs)

    compute_loss._peft_sieve_original = original  # type: ignore[attr-defined]
    trainer.compute_loss = compute_loss


def _compute_loss(
    original: Callable[..., Any],
    self: Any,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    base = self.accelerator.unwrap_model(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    with added_by_trainer():
        result = original(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
    if not (base.training and collected_by(base)):
        return result
    steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
    loss = result[0] if return_outputs else result
    loss = loss + auxiliary_loss(base).to(loss) / steps
    return (loss, result[1]) if return_outputs else loss
