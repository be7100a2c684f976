"""Adapters whose parameters are sharded by FSDP2: a scenario of tests/workers/two_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from peft_sieve import SieveLoraConfig
from tests.models import randomize_adapters, tiny_model, token_batch

# The outer factors of all but the first have a first dimension of 1, so that a process holds nothing of them.
SHARDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"cold_experts": "shared", "share_outer": True},
    "everything shared": {"cold_experts": "shared", "share_outer": True, "ids": []},
}


def adapted(ids: Any = (1, 4, 6), **settings: Any) -> PeftModel:
    mask = {f"model.layers.{i}.mlp.experts": list(ids) for i in range(2)}
    config = SieveLoraConfig(r=4, lora_dropout=0.0, selected_experts=mask, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model("olmoe"), config)
    randomize_adapters(model)
    return model


def train_a_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def train_sharded(rank: int, folder: Path) -> dict[str, Any]:
    """One step on a row for each process; leaves gradients and adapters in the folder, as one process would have them.

    Returns:
        How many slots of an outer factor this process holds, by the name of the settings.
    """
    held = {}
    for name, settings in SHARDED.items():
        model = adapted(**settings)
        blocks: Any = model.get_base_model().model.layers
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        train_a_step(model, {key: rows[rank : rank + 1] for key, rows in token_batch(model, batch=2).items()})
        held[name] = len(blocks[0].mlp.experts.lora_gate_up_A["default"].weight.to_local())
        gradients = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(folder / name, state_dict=whole)
            save_file(gradients, folder / name / "gradients.safetensors")
    return held
