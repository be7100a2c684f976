"""EPnG in the Trainer and in TRL's: ranks move, and a run resumed from a checkpoint is the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_sieve import EpngCallback, EpngConfig, SieveError, SieveLoraConfig
from tests.models import small_olmoe, small_tokenizer
from tests.training.runs import settings

LAST = 6
MASK = {f"model.layers.{i}.mlp.experts": list(range(i, i + 8)) for i in range(6)}


def config(**changes: Any) -> EpngConfig:
    given = {"r": 4, "selected_experts": MASK, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "warmup_steps": 2}
    return EpngConfig(**{**given, "update_interval": 2, "prune_ratio": 0.25, "grow_ratio": 0.25, **changes})


def trainer(kind: str, data: Dataset, folder: Path, peft_config: Any = None, **changes: Any) -> Trainer:
    common = settings(folder, **{"max_steps": LAST, "save_strategy": "steps", "save_steps": 3, **changes})
    peft_config = peft_config or config()
    if kind == "sft":
        arguments: Any = SFTConfig(**common, max_length=48, bf16=False)
        return SFTTrainer(
            small_olmoe(), arguments, train_dataset=data, peft_config=peft_config, callbacks=[EpngCallback()]
        )
    collator = DataCollatorForLanguageModeling(small_tokenizer(), mlm=False)
    model = get_peft_model(small_olmoe(), peft_config)
    arguments = TrainingArguments(**common)
    return Trainer(model, arguments, collator, data, callbacks=[EpngCallback()])


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(
    kind: str,
    tokens: Dataset,
    tmp_path: Path,
) -> None:
    whole = trainer(kind, tokens, tmp_path)
    whole.train()
    assert [entry.step for entry in whole.model.ledger()] == [2, 4, 6]
    assert all(entry.parameters == entry.budget for entry in whole.model.ledger())
    checkpoint = tmp_path / "checkpoint-3"
    saved = json.loads((checkpoint / "adapter_config.json").read_text())
    assert {step for rows in saved["ledger"].values() for step, _, _ in rows} == {2}

    resumed = trainer(kind, tokens, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.model.ledger() == whole.model.ledger()
    expected, found = (get_peft_model_state_dict(t.model) for t in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_callback_moves_ranks_under_trl_defaults(texts: Dataset, tmp_path: Path) -> None:
    """bfloat16 autocast and gradient checkpointing, and gradients accumulated: a step is one of the optimizer."""
    arguments = SFTConfig(**settings(tmp_path, max_steps=2, gradient_accumulation_steps=2), max_length=48)
    run = SFTTrainer(small_olmoe(), arguments, train_dataset=texts, peft_config=config(), callbacks=[EpngCallback()])
    run.train()
    assert [entry.step for entry in run.model.ledger()] == [2]


def test_what_cannot_work_is_refused_when_training_begins(tokens: Dataset, tmp_path: Path) -> None:
    sieve = SieveLoraConfig(r=4, selected_experts=MASK, task_type="CAUSAL_LM")
    with pytest.raises(SieveError, match="PeftModelForCausalLM, has no EPnG adapter in training"):
        trainer("trainer", tokens, tmp_path, sieve).train()
    run = trainer("trainer", tokens, tmp_path)
    for name, value, text in (
        ("torch_compile", True, "torch_compile=True.*EpngCallback"),
        ("deepspeed", "zero.json", "DeepSpeed or FSDP"),
        ("_n_gpu", 2, "over 2 GPUs"),
    ):
        arguments = TrainingArguments(**settings(tmp_path))
        setattr(arguments, name, value)
        with pytest.raises(SieveError, match=text):
            EpngCallback().on_train_begin(arguments, run.state, run.control, model=run.model)
