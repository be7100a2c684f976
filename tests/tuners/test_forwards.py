"""What part of an optimizer step a forward is, as transformers' Trainer counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from peft_sieve import LoraMoeConfig, PerftConfig
from peft_sieve.tuners.common.forwards import share_of_step
from tests.models import tiny_model
from tests.module_models import switch_transformers
from tests.training.runs import settings

TASKS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs"}
CONFIGS: dict[str, Any] = {
    "perft": lambda task: PerftConfig(r=2, balance_loss_coef=100.0, lora_dropout=0.0, task_type=task),
    "lora_moe": lambda task: LoraMoeConfig(
        r=2, num_experts=4, balance_loss_coef=100.0, lora_dropout=0.0, prune_ratio=None, task_type=task
    ),
}


def base(task: str) -> nn.Module:
    config = tiny_model("qwen2_moe").config
    config.num_labels = 3
    torch.manual_seed(0)
    return {**TASKS, "QUESTION_ANS": AutoModelForQuestionAnswering}[task].from_config(config)


def rows(task: str) -> Dataset:
    ids = [[5 + i, 6, 7, 8] for i in range(8)]
    labels: Any = {"CAUSAL_LM": ids, "SEQ_CLS": [i % 3 for i in range(8)], "TOKEN_CLS": [[1, 0, 2, -100]] * 8}[task]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 4] * 8, "labels": labels})


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_balance_loss_of_a_step_is_a_mean_of_its_batches(
    method: str, task: str, accumulated: int, tmp_path: Path
) -> None:
    model = get_peft_model(base(task), CONFIGS[method](task))
    shares, balance = [], []
    inner: Any = model.get_base_model()

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        shares.append(float(share_of_step(module, kwargs)))
        balance.append(float(model.base_model.auxiliary_loss()))

    inner.register_forward_hook(watch, with_kwargs=True)
    arguments = TrainingArguments(
        **settings(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.0,
            logging_steps=1,
        )
    )
    trainer = Trainer(model, arguments, train_dataset=rows(task))
    trainer.train()
    assert shares == pytest.approx([1 / accumulated] * accumulated)
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    # The models' own losses are below 10; the Trainer adds those of classifiers up.
    assert 0 < logged - sum(balance) / accumulated < 10 * accumulated < sum(balance)


def test_an_encoder_decoder_predicts_its_first_label_too() -> None:
    labels = torch.tensor([[3, 4, -100]])
    given = {"labels": labels, "num_items_in_batch": 4}
    assert share_of_step(switch_transformers(), given) == 0.5
    assert share_of_step(tiny_model("olmoe"), given) == 0.25
    assert share_of_step(tiny_model("olmoe"), {**given, "shift_labels": labels}) == 0.5
    assert share_of_step(tiny_model("olmoe"), {"labels": labels}) == 1


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("method", CONFIGS)
def test_heads_of_classifiers_are_trained_and_saved(method: str, task: str, tmp_path: Path) -> None:
    model = get_peft_model(base(task), CONFIGS[method](task))
    assert any(HEADS[task] in name and p.requires_grad for name, p in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    want = get_peft_model_state_dict(model)
    found = get_peft_model_state_dict(PeftModel.from_pretrained(base(task), tmp_path))
    assert any(HEADS[task] in key for key in want) and all(
        torch.equal(found[key], value) for key, value in want.items()
    )
