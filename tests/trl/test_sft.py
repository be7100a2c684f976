"""`SFTTrainer` with packed and padding-free batches, loss on the assistant's turns, and chats as calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from peft_sieve import profile_routing
from tests.models import small_olmoe, small_tokenizer
from tests.training.runs import Recording, settings
from tests.trl.scripts import assert_only_the_adapter_changed, assert_trained_like_lora, config_of, questions

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '\\n' }}"
    "{% endif %}{% endfor %}"
)


class RecordingSFTTrainer(Recording, SFTTrainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.batches = [*getattr(self, "batches", []), {**inputs}]
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def texts() -> Dataset:
    return Dataset.from_list([{"text": row["question"][: 60 + 10 * i]} for i, row in enumerate(questions(8))])


@pytest.fixture(scope="module")
def chats() -> Dataset:
    rows = questions(6)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["question"][:40]},
                    {"role": "assistant", "content": row["answer"][:40]},
                ]
            }
            for row in rows
        ]
    )


def sft(peft_config: Any, data: Dataset, folder: Path, tokenizer: Any = None, **changes: Any) -> RecordingSFTTrainer:
    fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    trainer = RecordingSFTTrainer(
        model=small_olmoe(),
        args=SFTConfig(**settings(folder, **{**fixed, **changes})),
        train_dataset=data,
        processing_class=tokenizer or small_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def lora_and_sieve(data: Dataset, folder: Path, **changes: Any) -> RecordingSFTTrainer:
    """The sieve adapter's trainer, after both have been trained and compared."""
    lora, sieve = (sft(config_of(method), data, folder / method, **changes) for method in ("lora", "sieve"))
    assert_trained_like_lora(sieve, lora)
    assert_only_the_adapter_changed(sieve)
    return sieve


def losses_of_rows(model: nn.Module, rows: list[list[int]]) -> float:
    """The mean over all next tokens, a row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return total / count


@pytest.mark.parametrize(
    "changes",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=lambda c: next(iter(c)),
)
def test_joined_samples_do_not_see_each_other(changes: dict[str, Any], texts: Dataset, tmp_path: Path) -> None:
    """The first batch's loss is that of its samples, each alone, with an adapter that is no no-op."""
    lora_and_sieve(texts, tmp_path, **changes)
    random = {"init_lora_weights": False, "lora_dropout": 0.0}
    trainer = sft(config_of("sieve", **random), texts, tmp_path / "random", **changes, max_steps=1, learning_rate=0.0)
    batch = trainer.batches[0]
    assert "attention_mask" not in batch and batch["input_ids"].shape[0] == 1
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    rows = [r.tolist() for r in batch["input_ids"][0].tensor_split(starts[1:])]
    assert len(rows) >= 2
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    alone = losses_of_rows(model, rows)
    with torch.no_grad():
        together = model(**{**batch, "output_router_logits": False}).loss.item()
    assert together == pytest.approx(alone, rel=1e-5)
    with model.disable_adapter():
        assert losses_of_rows(model, rows) != pytest.approx(alone, rel=1e-2)


def test_loss_on_the_assistant_only(chats: Dataset, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    trainer = lora_and_sieve(chats, tmp_path, tokenizer=tokenizer, assistant_only_loss=True)
    batch = trainer.batches[0]
    answers = {
        tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    assert answers <= {row["messages"][1]["content"] + tokenizer.eos_token for row in chats}
    assert len(answers) == 4


def test_chats_calibrate_as_the_template_renders_them(chats: Dataset, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    trainer = sft(
        config_of("sieve", calib_dataset=chats, calib_tokenizer=tokenizer), chats, tmp_path, tokenizer, max_steps=1
    )
    rendered = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chats]
    profile = profile_routing(small_olmoe(), rendered, tokenizer=tokenizer)
    config = trainer.model.peft_config["default"]
    assert config.calibration["tokens"] == profile.num_tokens
    for path, counts in profile.counts.items():
        taken, left = counts[config.selected_experts[path]], counts.clone()
        left[config.selected_experts[path]] = 0
        assert taken.min() >= left.max(), path
