"""Whole runs with Trainer and SFTTrainer: what they change, what they save, and that they go on where they stopped."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from trl import DPOConfig, DPOTrainer

from peft_sieve import PerftConfig, SieveError
from tests.models import small_olmoe, small_tokenizer, token_batch
from tests.training.runs import (
    CHECKPOINT_STEP,
    LAST_STEP,
    Recording,
    assert_falls,
    assert_same,
    copied,
    plain_trainer,
    settings,
    sft_trainer,
)
from tests.tuners.perft.adapted import adapted, randomize

EXPERTS = {f"model.layers.{i}.mlp.experts": list(range(i, 30, 3)) for i in range(6)}
# One of each; the hot experts are given, so that only `test_sft_trainer_needs_only_another_peft_config` calibrates.
KINDS: dict[str, dict[str, Any]] = {
    "R": {"variant": "R", "num_adapters": 4},
    "E": {"variant": "E", "selected_experts": EXPERTS},
    "D": {"variant": "D", "num_adapters": 2},
    "S": {"variant": "S", "form": "bottleneck"},
}


def perft_config(kind: str, **changes: Any) -> PerftConfig:
    return PerftConfig(**{"r": 8, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **KINDS[kind], **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_changes_the_adapter_and_nothing_else(kind: str, tokens: Dataset, tmp_path: Path) -> None:
    model = get_peft_model(small_olmoe(), perft_config(kind))
    before = copied(model.state_dict())
    trainer = plain_trainer(model, tokens, tmp_path, max_steps=12, learning_rate=2e-2)
    trainer.train()
    assert_falls(trainer.losses)
    after = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in after if ".perft_" in name and name.endswith(".weight")}
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained


def test_sft_trainer_needs_only_another_peft_config(texts: Dataset, tmp_path: Path) -> None:
    """With TRL's own defaults: bfloat16 autocast and gradient checkpointing; hot experts are found on the way."""
    config = PerftConfig(variant="E", calib_dataset=texts, task_type="CAUSAL_LM")
    trainer = sft_trainer(config, texts, tmp_path / "run", max_steps=8, learning_rate=2e-2)
    trainer.train()
    assert_falls(trainer.losses)
    own = trainer.model.peft_config["default"]
    assert own.calibration["samples"] == len(texts) and {len(ids) for ids in own.selected_experts.values()} == {8}
    trainer.save_model(str(tmp_path / "adapter"))
    trained = get_peft_model_state_dict(trainer.model)
    assert_same(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), trained)
    loaded = PeftModel.from_pretrained(small_olmoe(), str(tmp_path / "adapter"))
    assert_same(get_peft_model_state_dict(loaded), trained)
    ids = torch.tensor([small_tokenizer()(texts[0]["text"]).input_ids])
    # Out of the autocast that the trainer put around its forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def resumable(trainer: str, config: PerftConfig, data: Dataset, folder: Path) -> Recording:
    changes: dict[str, Any] = {"max_steps": LAST_STEP, "save_strategy": "steps", "save_steps": CHECKPOINT_STEP}
    if trainer == "sft":
        return sft_trainer(config, data, folder, bf16=False, **changes)
    return plain_trainer(get_peft_model(small_olmoe(), config), data, folder, **changes)


@pytest.mark.parametrize(("trainer", "kind"), [("trainer", "R"), ("sft", "R"), ("trainer", "E"), ("sft", "S")])
def test_resumed_run_repeats_the_uninterrupted_one(
    trainer: str,
    kind: str,
    tokens: Dataset,
    tmp_path: Path,
) -> None:
    """To the bit, dropout and the balance loss included; a checkpoint of other experts is refused."""
    torch.manual_seed(5)
    whole = resumable(trainer, perft_config(kind), tokens, tmp_path / "whole")
    whole.train()
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{CHECKPOINT_STEP}")
    torch.manual_seed(99)  # another initial adapter
    rest = resumable(trainer, perft_config(kind), tokens, tmp_path / "rest")
    rest.train(resume_from_checkpoint=checkpoint)
    assert len(whole.losses) == LAST_STEP
    assert rest.losses == whole.losses[CHECKPOINT_STEP:]
    assert_same(get_peft_model_state_dict(rest.model), get_peft_model_state_dict(whole.model))

    if kind == "E":
        others = {path: [i + 1 for i in ids] for path, ids in EXPERTS.items()}
        other = resumable(trainer, perft_config(kind, selected_experts=others), tokens, tmp_path / "other")
        before = copied(other.model.state_dict())
        with pytest.raises(SieveError, match=r"belong to experts \[0, 3, 6.*has \[1, 4, 7"):
            other.train(resume_from_checkpoint=checkpoint)
        assert_same(other.model.state_dict(), before)


def test_a_loaded_adapter_is_trained_on(tokens: Dataset, tmp_path: Path) -> None:
    model = get_peft_model(small_olmoe(), perft_config("R"))
    randomize(model, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(small_olmoe(), str(tmp_path / "adapter"), is_trainable=True)
    losses = []
    for one in (model, loaded):
        trainer = plain_trainer(one, tokens, tmp_path / "run", max_steps=2)
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]
    frozen = PeftModel.from_pretrained(small_olmoe(), str(tmp_path / "adapter"))
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_dpo_takes_the_bare_model_as_reference_and_says_that_it_leaves_the_balance_loss_out(
    coef: float, tmp_path: Path
) -> None:
    rows = [{"prompt": "Tom has", "chosen": " three apples", "rejected": " no pens at all"}] * 4
    trainer = DPOTrainer(
        small_olmoe(),
        args=DPOConfig(**settings(tmp_path, max_steps=2, per_device_train_batch_size=2, bf16=False)),
        train_dataset=Dataset.from_list(rows),
        processing_class=small_tokenizer(),
        peft_config=perft_config("R", lora_dropout=0.0, balance_loss_coef=coef),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert any("was not used" in str(warning.message) for warning in caught) == bool(coef)
    # A new adapter adds nothing: policy and reference are alike. The base model's own balance loss is added by TRL.
    first = trainer.state.log_history[0]
    own = small_olmoe().config.router_aux_loss_coef * first["aux_loss"]
    assert first["loss"] == pytest.approx(math.log(2) + own, abs=1e-4)


@pytest.mark.parametrize("variant", "REDS")
def test_checkpointed_layers_have_the_same_gradients(variant: str) -> None:
    """With dropout: what runs again draws the same numbers, and finds the same dispatch."""
    gradients: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        model: nn.Module = adapted(variant, lora_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        batch = token_batch(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".perft_" in name})
    assert_same(gradients[0], gradients[1])
