"""Saves of transformers' Trainer that would leave an adapter out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from .methods import adapters_of_package


def wrap_trainer() -> None:
    """Have `Trainer.save_model` write adapters of a sharded model; nothing if no Trainer is in use. Once is enough.

    Missing: a hook for what is saved. With FSDP's SHARDED_STATE_DICT, Trainer leaves the whole model to accelerate's
    checkpoints, and `save_model` writes nothing.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or hasattr(trainer.save_model, "_peft_sieve_original"):
        return
    original = trainer.save_model

    @wraps(original)
    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if _leaves_out(self) and isinstance(model, PeftModel) and adapters_of_package(model):
            self._save(output_dir or self.args.output_dir, state_dict=gathered_adapters(model))
        original(self, output_dir, _internal_call)

    save_model._peft_sieve_original = original  # type: ignore[attr-defined]
    trainer.save_model = save_model


def _leaves_out(trainer: Any) -> bool:
    if not trainer.is_fsdp_enabled:
        return False
    return "FULL_STATE_DICT" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def gathered_adapters(model: PeftModel) -> dict[str, torch.Tensor]:
    """Of a sharded model's state dict what belongs to its adapters, whole and on the CPU.

    All processes have to call it.
    """
    everything: Mapping[str, torch.Tensor] = model.state_dict()
    saved = [get_peft_model_state_dict(model, state_dict=everything, adapter_name=name) for name in model.peft_config]
    wanted = {id(value) for of_adapter in saved for value in of_adapter.values()}
    return {key: _whole(value) for key, value in everything.items() if id(value) in wanted}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
