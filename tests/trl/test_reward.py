"""`RewardTrainer`: an adapter and the head of a sequence classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from peft_sieve import SieveLoraConfig
from tests.models import CONFIGS, small_tokenizer
from tests.training.runs import assert_same, copied, settings
from tests.trl.scripts import ATTENTION, assert_only_the_adapter_changed, assert_trained_like_lora, preferences

# Those of the models in tests/models.py that have a sequence classifier; OLMoE has none.
NAMES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return preferences(6)


def classifier(name: str) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = CONFIG_MAPPING[name](
        **{
            **CONFIGS[name],
            **sizes,
            "vocab_size": 4096,
            "max_position_embeddings": 128,
            "num_labels": 1,
            "pad_token_id": 1,
        }
    )
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def reward(peft_config: Any, name: str, data: Dataset, folder: Path) -> RewardTrainer:
    fixed = {"max_steps": 2, "per_device_train_batch_size": 3, "bf16": False, "gradient_checkpointing": False}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    return RewardTrainer(
        model=classifier(name),
        args=RewardConfig(**settings(folder, max_length=48, **fixed, **saving)),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=small_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("name", NAMES)
def test_trains_adapter_and_head(name: str, data: Dataset, tmp_path: Path) -> None:
    trainers = {}
    common = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    for method, config in {
        "lora": LoraConfig(**common, target_modules=ATTENTION),
        # Most of the experts: in the last layer only those of the sequences' last token get gradients.
        "sieve": SieveLoraConfig(**common, top_k_frac=0.75, calib_dataset=data, calib_tokenizer=small_tokenizer()),
    }.items():
        trainer = reward(config, name, data, tmp_path / method)
        trainer.train()
        trainers[method] = trainer
    assert_trained_like_lora(trainers["sieve"], trainers["lora"])
    assert_only_the_adapter_changed(trainers["sieve"], classifier(name))
    trained = get_peft_model_state_dict(trainers["sieve"].model)
    assert not trained["base_model.model.score.weight"].equal(classifier(name).score.weight)

    resumed = reward(config, name, data, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "sieve" / "checkpoint-1"))
    assert_same(get_peft_model_state_dict(resumed.model), trained)

    loaded = PeftModel.from_pretrained(classifier(name), tmp_path / "sieve" / "checkpoint-2").eval()
    batch = small_tokenizer()(list(data["chosen"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = loaded(**batch).logits
        assert scores.equal(trainers["sieve"].model.eval()(**batch).logits)
        before = copied(loaded.state_dict())
        loaded.merge_adapter()
        torch.testing.assert_close(loaded(**batch).logits, scores, rtol=1e-4, atol=1e-5)
        loaded.unmerge_adapter()
    assert_same(loaded.state_dict(), before)
