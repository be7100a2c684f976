"""Short training runs on the small real MoE: their data, settings and trainers, and what runs are compared by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.models import small_olmoe, small_tokenizer

MAX_LENGTH = 32
NUM_EXPERTS = 32
CHECKPOINT_STEP, LAST_STEP = 4, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums come out the same in every run, and small products are not slower for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts() -> Dataset:
    path = Path(__file__).parents[1] / "data" / "gsm8k_train_64.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"text": f"Question: {r['question']}\nAnswer: {r['answer']}"} for r in rows[:16]])


@pytest.fixture(scope="module")
def tokens(texts: Dataset) -> Dataset:
    encoded = small_tokenizer()(list(texts["text"]), truncation=True, max_length=MAX_LENGTH)
    return Dataset.from_dict({"input_ids": encoded["input_ids"]})


class Recording:
    """Mixed into a trainer: the exact loss of every step (logs round it), and the gradients of the last one."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), loss.item()]
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss


class RecordingTrainer(Recording, Trainer):
    pass


class RecordingSFTTrainer(Recording, SFTTrainer):
    pass


def settings(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Arguments common to TrainingArguments and SFTConfig."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def plain_trainer(model: nn.Module, data: Dataset, output_dir: Path, **changes: Any) -> RecordingTrainer:
    return RecordingTrainer(
        model=model,
        args=TrainingArguments(**settings(output_dir, **changes)),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(small_tokenizer(), mlm=False),
    )


def sft_trainer(peft_config: LoraConfig, data: Dataset, output_dir: Path, **changes: Any) -> RecordingSFTTrainer:
    return RecordingSFTTrainer(
        model=small_olmoe(),
        args=SFTConfig(**settings(output_dir, max_length=MAX_LENGTH, **changes)),
        train_dataset=data,
        peft_config=peft_config,
    )


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Same names, same types, same bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def assert_falls(losses: list[float]) -> None:
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3, losses
