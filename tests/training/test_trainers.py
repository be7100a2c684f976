"""Training through the tools that people use (Trainer, TRL, autocast, checkpointing, resuming), on the small real MoE.

Runs that are compared with each other are compared to the bit: they share this process and its number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
from tests.models import randomize_adapters, small_olmoe, small_tokenizer
from tests.training.runs import (
    CHECKPOINT_STEP,
    LAST_STEP,
    MAX_LENGTH,
    NUM_EXPERTS,
    Recording,
    RecordingSFTTrainer,
    RecordingTrainer,
    assert_falls,
    assert_same,
    copied,
    plain_trainer,
    sft_trainer,
)


@pytest.fixture(scope="module")
def mask(tokens: Dataset) -> dict[str, list[int]]:
    """What calibration on `tokens` gives."""
    model = get_peft_model(small_olmoe(), sieve_config(calib_dataset=tokens))
    return model.peft_config["default"].selected_experts


@pytest.fixture(scope="module")
def batch(tokens: Dataset) -> dict[str, torch.Tensor]:
    """Two sequences of full length with labels."""
    ids = torch.tensor([row for row in tokens["input_ids"] if len(row) == MAX_LENGTH][:2])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def sieve_config(**settings: Any) -> SieveLoraConfig:
    return SieveLoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings})


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith("mlp.experts")}


def test_trainer_changes_the_adapter_and_nothing_else(tokens: Dataset, tmp_path: Path) -> None:
    base = copied(small_olmoe().state_dict())
    model = get_peft_model(small_olmoe(), SieveLoraConfig(calib_dataset=tokens, task_type="CAUSAL_LM"))
    before = copied(model.state_dict())

    trainer = plain_trainer(model, tokens, tmp_path, max_steps=12)
    trainer.train()

    assert_falls(trainer.losses)
    after = model.state_dict()
    assert after.keys() == before.keys()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in after if "lora_" in name and name.endswith(".weight")}
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    inside = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in after.items()
        if "lora_" not in name
    }
    assert_same(inside, base)


def test_sft_trainer_needs_only_another_peft_config(texts: Dataset, tmp_path: Path) -> None:
    def train(peft_config: LoraConfig, max_steps: int) -> RecordingSFTTrainer:
        # TRL's own defaults: bfloat16 autocast and gradient checkpointing.
        trainer = sft_trainer(peft_config, texts, tmp_path / "run", max_steps=max_steps)
        trainer.train()
        return trainer

    train(LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), max_steps=1)
    trainer = train(SieveLoraConfig(calib_dataset=texts, task_type="CAUSAL_LM"), max_steps=8)

    assert_falls(trainer.losses)
    config = trainer.model.peft_config["default"]
    assert config.peft_type == "SIEVE_LORA"
    assert config.calibration["samples"] == len(texts)

    trainer.save_model(str(tmp_path / "adapter"))
    trained = get_peft_model_state_dict(trainer.model)
    assert_same(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), trained)
    loaded = PeftModel.from_pretrained(small_olmoe(), str(tmp_path / "adapter"))
    assert_same(get_peft_model_state_dict(loaded), trained)
    assert loaded.peft_config["default"].selected_experts == config.selected_experts
    assert loaded.peft_config["default"].calibration == config.calibration
    ids = torch.tensor([small_tokenizer()(texts[0]["text"]).input_ids])
    # Out of the autocast that the trainer put around its forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# Resuming


def resumable(kind: str, config: SieveLoraConfig, data: Dataset, output_dir: Path) -> Recording:
    """A trainer that saves once, in the middle; `kind` is "trainer" or "sft"."""
    changes = {"max_steps": LAST_STEP, "save_strategy": "steps", "save_steps": CHECKPOINT_STEP}
    if kind == "sft":
        return sft_trainer(config, data, output_dir, bf16=False, **changes)
    return plain_trainer(get_peft_model(small_olmoe(), config), data, output_dir, **changes)


@dataclass(frozen=True)
class FinishedRun:
    losses: list[float]
    weights: dict[str, torch.Tensor]
    checkpoint: str


@pytest.fixture(scope="module")
def uninterrupted(tokens: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """A finished run for each kind of trainer, with dropout."""
    runs = {}
    for kind in ("trainer", "sft"):
        folder = tmp_path_factory.mktemp(kind)
        trainer = resumable(kind, sieve_config(calib_dataset=tokens, lora_dropout=0.1), tokens, folder)
        trainer.train()
        weights = copied(get_peft_model_state_dict(trainer.model))
        runs[kind] = FinishedRun(trainer.losses, weights, str(folder / f"checkpoint-{CHECKPOINT_STEP}"))
    return runs


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_resumed_run_repeats_the_uninterrupted_one(
    kind: str, uninterrupted: dict[str, FinishedRun], tokens: Dataset, tmp_path: Path
) -> None:
    """Losses and weights are equal to the bit, dropout included: the Trainer restores the random state."""
    run = uninterrupted[kind]
    torch.manual_seed(99)  # another initial adapter than the first run's
    trainer = resumable(kind, sieve_config(calib_dataset=tokens, lora_dropout=0.1), tokens, tmp_path)
    trainer.train(resume_from_checkpoint=run.checkpoint)

    assert len(run.losses) == LAST_STEP
    assert trainer.losses == run.losses[CHECKPOINT_STEP:]
    assert_same(get_peft_model_state_dict(trainer.model), run.weights)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_resuming_under_another_mask_is_refused(
    kind: str, uninterrupted: dict[str, FinishedRun], mask: dict[str, list[int]], tokens: Dataset, tmp_path: Path
) -> None:
    """The masks have the same sizes, so the shapes of all weights fit."""
    path, saved_ids = next(iter(mask.items()))
    other = {p: sorted(set(range(NUM_EXPERTS)) - set(ids))[: len(ids)] for p, ids in mask.items()}
    assert [len(ids) for ids in other.values()] == [len(ids) for ids in mask.values()]
    trainer = resumable(kind, sieve_config(selected_experts=other, lora_dropout=0.1), tokens, tmp_path)
    before = copied(trainer.model.state_dict())
    assert {n: t.shape for n, t in get_peft_model_state_dict(trainer.model).items()} == {
        n: t.shape for n, t in uninterrupted[kind].weights.items()
    }

    with pytest.raises(SieveError) as refusal:
        trainer.train(resume_from_checkpoint=uninterrupted[kind].checkpoint)

    text = str(refusal.value)
    assert str(saved_ids) in text and str(other[path]) in text and path in text, text
    assert_same(trainer.model.state_dict(), before)
    assert not hasattr(trainer, "losses")


def test_best_checkpoint_is_loaded_at_the_end_and_old_ones_go(
    mask: dict[str, list[int]], tokens: Dataset, tmp_path: Path
) -> None:
    model = get_peft_model(small_olmoe(), sieve_config(selected_experts=mask))
    # "Best" is the highest loss here: the first checkpoint, which is not what the model holds at the end.
    trainer = plain_trainer(
        model,
        tokens,
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        label_names=["labels"],
    )
    trainer.train()

    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    best, last = (load_file(tmp_path / f"checkpoint-{i}" / "adapter_model.safetensors") for i in (1, 3))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert_same(get_peft_model_state_dict(model), best)


# Precision, checkpointing, gradients


# Reentrant checkpointing runs the first forward without gradients, so the router logits that transformers collects
# there have none, and the load-balancing loss trains nothing. That is so with any adapter, LoRA's too: here it is off.
@pytest.mark.parametrize(("use_reentrant", "balancing_loss"), [(True, False), (False, True)])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    use_reentrant: bool, balancing_loss: bool, mask: dict[str, list[int]], tokens: Dataset, tmp_path: Path
) -> None:
    """To the bit, with dropout: recomputation draws the same numbers again."""

    def first_step(**changes: Any) -> tuple[RecordingTrainer, int]:
        base = small_olmoe()
        base.config.output_router_logits = balancing_loss
        model = get_peft_model(base, sieve_config(selected_experts=mask, lora_dropout=0.1))
        randomize_adapters(model)
        calls = []
        for layer in expert_layers(model).values():
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        trainer = plain_trainer(model, tokens, tmp_path, max_steps=1, **changes)
        trainer.train()
        return trainer, len(calls)

    plain, num_calls = first_step()
    factors = [name for name in plain.gradients if ".mlp.experts.lora_" in name]
    assert len(factors) == 4 * len(mask)
    assert all(plain.gradients[name].any() for name in factors)

    kwargs = {"use_reentrant": use_reentrant}
    checkpointed, num_calls_again = first_step(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert num_calls_again == 2 * num_calls, "nothing was recomputed"
    assert checkpointed.losses == plain.losses
    assert_same(checkpointed.gradients, plain.gradients)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast_trains_float32_adapters(
    base_dtype: torch.dtype, mask: dict[str, list[int]], batch: dict[str, torch.Tensor]
) -> None:
    model = get_peft_model(small_olmoe(base_dtype), sieve_config(selected_experts=mask))
    randomize_adapters(model, std=0.02)
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-3)

    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in adapters.items():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()

    assert all(map(math.isfinite, losses)) and losses[2] < losses[0], losses
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}


def test_gradients_reach_exactly_the_slots_whose_experts_received_tokens(batch: dict[str, torch.Tensor]) -> None:
    # Every third expert, wherever the tokens go: some receive none.
    chosen = list(range(0, NUM_EXPERTS, 3))
    mask = {f"model.layers.{i}.mlp.experts": chosen for i in range(6)}
    model = get_peft_model(small_olmoe(), sieve_config(selected_experts=mask, lora_dropout=0.0))
    randomize_adapters(model)
    received: dict[str, set[int]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            received[name] = set(args[1].flatten().tolist())

        return hook

    layers = expert_layers(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
    # Every position counts, also the last one, which the language-model loss leaves out.
    model(input_ids=batch["input_ids"][:1, :12]).logits.square().mean().backward()

    seen = set()
    for name, layer in layers.items():
        for factor in ("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B"):
            grad = getattr(layer, factor)["default"].weight.grad  # (slots, ranks, features)
            parts = grad.chunk(2, dim=1) if "gate_up" in factor else [grad]
            for part in parts:
                reached = {expert for slot, expert in enumerate(chosen) if part[slot].any()}
                assert reached == received[name].intersection(chosen), (name, factor)
        seen.update(expert in received[name] for expert in chosen)
    assert seen == {True, False}, "the text must reach some of the chosen experts, and not all"
