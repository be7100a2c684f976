"""A callback for transformers' `Trainer` that drives EPnG: importance after every step, updates when they are due."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..errors import SieveError
from ..routing.plain_model import unwrapped
from ..tuners.epng.update import trained_adapters, update_and_allocate
from .trainers import check_hooks_see


class EpngCallback(TrainerCallback):
    """Calls `update_and_allocate` after every optimizer step, for the Trainer of transformers and those of TRL:
    `Trainer(..., callbacks=[EpngCallback()])`.

    Raises:
        SieveError: when training begins: no EPnG adapter is being trained, or its routing cannot be counted or its
            parameters not be moved in the way that the trainer runs.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look whether it will work."""
        model = kwargs["model"]
        if not trained_adapters(model):
            raise SieveError(
                f"the trainer's model, a {type(model).__name__}, has no EPnG adapter in training, expected one: train "
                "an EpngConfig, or leave EpngCallback out"
            )
        check_hooks_see(args, "EpngCallback")
        if args.deepspeed or args.fsdp:
            raise SieveError(
                "the trainer uses DeepSpeed or FSDP, expected parameters and optimizer states that are whole in each "
                "process, since their rows move: train with DistributedDataParallel, or a SieveLoraConfig"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, and before anything is saved."""
        base: Any = unwrapped(kwargs["model"])
        update_and_allocate(base, base.peft_config, state.global_step, kwargs.get("optimizer"))
