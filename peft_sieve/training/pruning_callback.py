"""A callback for transformers' `Trainer` that trains LoRA experts with their balance loss and prunes them once."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import SieveError
from ..routing.plain_model import unwrapped
from ..tuners.common.balance_in_trainers import loss_with_balance
from ..tuners.lora_moe.pruning import adapters_to_prune, lora_moe_layers, refuse_several_processes, update_and_prune
from .trainers import check_same_trainer, check_trainer, wrap_method


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
        check_trainer(self, trainer)
        self.trainer = trainer
        self._restore = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the run, and take the balance loss to `compute_loss`; also after a run that an exception ended."""
        self._restore.close()
        check_same_trainer(self, state)
        if not lora_moe_layers(self._model()):
            raise SieveError(
                f"The trainer's model, a {type(self.trainer.model).__name__}, has no LoRA experts. Train a "
                "LoraMoeConfig, or leave ExpertPruningCallback out."
            )
        self._check_pruning(args, state)
        wrapped = partial(loss_with_balance, self.trainer)
        self._restore.callback(wrap_method(self.trainer, "compute_loss", wrapped))

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
                    f"The trainer spreads one process over {args.n_gpu} GPUs, where copies of a router are not "
                    "counted. Show the process one GPU."
                )
            if step > state.max_steps:
                raise SieveError(
                    f"Adapter '{name}' is to be pruned after step {step}, and training has {state.max_steps} steps. "
                    "Lower prune_step, or set it and prune_ratio to None to keep all experts."
                )
