"""`DPOTrainer`: the reference is the base model, or a copy of the adapter that training began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from trl import DPOConfig, DPOTrainer

from tests.models import randomize_adapters, small_olmoe, small_tokenizer
from tests.training.runs import assert_same, copied, settings
from tests.trl.scripts import assert_only_the_adapter_changed, assert_trained_like_lora, config_of, preferences


@pytest.fixture(scope="module")
def data() -> Dataset:
    return preferences(6)


def dpo(model: nn.Module, peft_config: Any, data: Dataset, folder: Path, **changes: Any) -> DPOTrainer:
    changes = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        **changes,
    }
    return DPOTrainer(
        model=model,
        args=DPOConfig(**settings(folder, max_length=48, **changes)),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=small_tokenizer(),
        peft_config=peft_config,
    )


def reference_log_probabilities(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each sequence's answer, by a plain forward: (chosen and rejected,)"""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:, None]
    return (logits.log_softmax(-1).gather(-1, tokens)[..., 0] * batch["completion_mask"][:, 1:]).sum(1)


def test_the_base_model_is_the_reference(data: Dataset, tmp_path: Path) -> None:
    """With evaluation, checkpoints, and the best of them at the end."""
    trainers = {}
    for method in ("lora", "sieve"):
        config = config_of(method, **({"calib_dataset": data} if method == "sieve" else {}))
        changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = dpo(small_olmoe(), config, data, tmp_path / method, **changes, load_best_model_at_end=True)
        trainer.train()
        trainers[method] = trainer
    assert_trained_like_lora(trainers["sieve"], trainers["lora"])
    trainer = trainers["sieve"]
    assert_only_the_adapter_changed(trainer)
    assert trainer.model.peft_config["default"].calibration["samples"] == 2 * len(data)

    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    torch.testing.assert_close(reference, reference_log_probabilities(small_olmoe(), batch))
    policy = reference_log_probabilities(trainer.model.eval(), batch)
    assert not torch.allclose(reference, policy, atol=1e-2)

    # A run that is resumed ends where the first one did.
    resumed = dpo(small_olmoe(), config_of("sieve", calib_dataset=data), data, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "sieve" / "checkpoint-1"))
    last = load_file(tmp_path / "sieve" / "checkpoint-2" / "adapter_model.safetensors")
    assert_same(get_peft_model_state_dict(resumed.model), last)


def test_a_loaded_adapter_is_its_own_first_reference(data: Dataset, tmp_path: Path) -> None:
    """TRL copies it under the name "ref", parameter by parameter."""
    trainers = {}
    for method in ("lora", "sieve"):
        start = get_peft_model(small_olmoe(), config_of(method))
        randomize_adapters(start, std=0.05)
        start.save_pretrained(tmp_path / f"{method}-start")
        model = PeftModel.from_pretrained(small_olmoe(), tmp_path / f"{method}-start", is_trainable=True)
        trainer = dpo(model, None, data, tmp_path / method, save_strategy="steps", save_steps=2)
        before = copied(get_peft_model_state_dict(trainer.model, adapter_name="default"))
        assert_same(get_peft_model_state_dict(trainer.model, adapter_name="ref"), before)
        trainer.train()
        assert trainer.model.active_adapter == "default"
        assert trainer.state.log_history[0]["rewards/margins"] == 0.0
        after = get_peft_model_state_dict(trainer.model, adapter_name="default")
        assert not any(after[name].equal(before[name]) for name in after if name.endswith(".weight"))
        assert_same(get_peft_model_state_dict(trainer.model, adapter_name="ref"), before)
        trainers[method] = trainer
    assert_trained_like_lora(trainers["sieve"], trainers["lora"])

    trainer = trainers["sieve"]
    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    beginning = PeftModel.from_pretrained(small_olmoe(), tmp_path / "sieve-start").eval()
    torch.testing.assert_close(reference, reference_log_probabilities(beginning, batch))
    # The checkpoint holds both, each with its mask.
    saved = tmp_path / "sieve" / "checkpoint-2"
    loaded = PeftModel.from_pretrained(small_olmoe(), saved)
    assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(trainer.model))
    assert_same(load_file(saved / "ref" / "adapter_model.safetensors"), before)
