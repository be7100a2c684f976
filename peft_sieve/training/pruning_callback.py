"""A callback for transformers' `Trainer` that trains LoRA experts with their balance loss and prunes them once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import SieveError
from ..routing.plain_model import unwrapped
from ..tuners.lora_moe.pruning import adapters_to_prune, lora_moe_layers, refuse_several_processes, update_and_prune
from .trainer_methods import wrap_method


class ExpertPruningCallback(TrainerCallback):
    """Prunes the experts of a `LoraMoeConfig` at its `prune_step` or `prune_ratio`, in any Trainer (DMEP).

    Until then it adds the balance loss to what the trainer's `compute_loss` returns, so that it also reaches the
    trainers of TRL, which make their losses themselves. Checkpoints from before and after pruning are resumed.

    Args:
        trainer: the Trainer, or one derived from it, to which the callback is then added:
            `trainer.add_callback(ExpertPruningCallback(trainer))`.

    Raises:
        SieveError: there are no LoRA experts in training, or they cannot be pruned in this run; when training begins.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise SieveError(
                f"received {type(trainer).__name__} as the trainer, expected a Trainer of transformers or TRL: make it "
                "first, then trainer.add_callback(ExpertPruningCallback(trainer))"
            )
        self.trainer = trainer
        self._restore = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the run, and take the balance loss to `compute_loss`; also after a run that an exception ended."""
        self._restore.close()
        if self.trainer.state is not state:
            raise SieveError(
                "ExpertPruningCallback was added to another trainer than it was made with, expected the same: use "
                "trainer.add_callback(ExpertPruningCallback(trainer))"
            )
        layers = lora_moe_layers(self._model())
        if not layers:
            raise SieveError(
                f"the trainer's model, a {type(self.trainer.model).__name__}, has no LoRA experts, expected an adapter "
                "of a LoraMoeConfig: train one, or leave ExpertPruningCallback out"
            )
        self._check_pruning(args, state)
        record = layers[0][1].record
        before, record.adds_to_outputs = record.adds_to_outputs, False
        self._restore.callback(setattr, record, "adds_to_outputs", before)
        self._restore.callback(wrap_method(self.trainer, "compute_loss", self._with_balance))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, if the step has come: before the Trainer saves what it has after this step."""
        model: Any = self._model()
        update_and_prune(model, model.peft_config, state.global_step, self.trainer.optimizer, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its method back."""
        self._restore.close()

    def _model(self) -> nn.Module:
        model = self.trainer.model
        assert model is not None
        return unwrapped(model)

    def _check_pruning(self, args: Any, state: Any) -> None:
        model: Any = self._model()
        for name in adapters_to_prune(model):
            step = model.peft_config[name].pruning_step(state.max_steps)
            if step is None:
                continue
            refuse_several_processes()
            if args.n_gpu > 1:
                raise SieveError(
                    f"the trainer spreads one process over {args.n_gpu} GPUs, expected one GPU, since copies of a "
                    "router would not be counted: show the process one GPU"
                )
            if step > state.max_steps:
                raise SieveError(
                    f"adapter '{name}' is to be pruned after step {step} and training has {state.max_steps}, expected "
                    "an earlier step: lower prune_step, or set it and prune_ratio to None to keep all experts"
                )

    def _with_balance(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = compute_loss(model, inputs, *args, **kwargs)
        layers = lora_moe_layers(self._model())
        if not model.training or not layers:
            return result
        balance = layers[0][1].record.auxiliary_loss() / self._batches_to_add_up(kwargs.get("num_items_in_batch"))
        loss: torch.Tensor = result[0] if isinstance(result, tuple) else result
        loss = loss + balance.to(loss.device)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def _batches_to_add_up(self, num_items_in_batch: Any) -> int:
        """Over how many batches the trainer adds up what `compute_loss` returns; 1 if it averages."""
        trainer: Any = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or trainer.compute_loss_func is not None
        return trainer.current_gradient_accumulation_steps if scaled else 1
