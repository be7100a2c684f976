"""Balance loss and pruning in Trainer and SFTTrainer, and checkpoints from before and after pruning resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from peft_sieve import ExpertPruningCallback, LoraMoeConfig, SieveError
from tests.models import small_olmoe, small_tokenizer
from tests.training.runs import Recording, assert_same, copied, plain_trainer, settings, sft_trainer
from tests.trl.scripts import preferences, questions
from tests.tuners.lora_moe.models import layers_of

LAST_STEP, PRUNE_STEP = 5, 3


@pytest.fixture(scope="module")
def tokens() -> Dataset:
    """Of different lengths, so that batches have padding and unequal numbers of tokens."""
    texts = [row["question"][: 30 + 10 * i] for i, row in enumerate(questions(12))]
    encoded = small_tokenizer()(texts, truncation=True, max_length=24)
    return Dataset.from_dict({"input_ids": encoded["input_ids"]})


def config_of(**changes: Any) -> LoraMoeConfig:
    common = {"r": 2, "num_experts": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraMoeConfig(**{**common, "prune_step": PRUNE_STEP, "prune_threshold": 1.05, **changes})


def trainer_of(
    kind: str, data: Dataset, folder: Path, callback: bool = True, changes: Any = None, seed: int = 0, **others: Any
) -> Any:
    others = {"per_device_train_batch_size": 2, "max_steps": LAST_STEP, **others}
    config = config_of(**(changes or {}))
    torch.manual_seed(seed)
    if kind == "sft":
        trainer = sft_trainer(config, data, folder, **{"bf16": False, "gradient_checkpointing": False, **others})
    else:
        trainer = plain_trainer(get_peft_model(small_olmoe(), config), data, folder, **others)
    if callback:
        trainer.add_callback(ExpertPruningCallback(trainer))
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("kind", "callback"), [("trainer", False), ("trainer", True), ("sft", True)])
def test_balance_loss_is_part_of_the_loss_once(
    kind: str, callback: bool, accumulation: int, tokens: Dataset, tmp_path: Path
) -> None:
    """Against the same first step without it; over accumulated batches it is averaged, not added up."""
    runs = {}
    for coef in (0.0, 2.0):
        trainer = trainer_of(
            kind,
            tokens,
            tmp_path,
            callback,
            changes={"balance_loss_coef": coef, "lora_dropout": 0.0, "prune_step": 1},
            max_steps=1,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
        )
        seen: list[float] = []
        model = trainer.model
        inner = model.get_base_model()
        inner.register_forward_hook(lambda *_, m=model, s=seen: s.append(m.auxiliary_loss().item()))
        trainer.train()
        runs[coef] = trainer, seen
    (plain, nothing), (balanced, losses) = runs[0.0], runs[2.0]
    assert len(losses) == accumulation and nothing == [0.0] * accumulation
    assert all(loss > 2.0 for loss in losses)  # 1 is the least
    added = sum(balanced.losses) - sum(plain.losses)
    if kind == "trainer" and not callback:  # by tokens
        assert min(losses) * 0.999 <= added <= max(losses) * 1.001
    else:
        assert added == pytest.approx(sum(losses) / accumulation, rel=1e-4)
    routers = [name for name in balanced.gradients if "lora_router" in name]
    assert len(routers) == 12 and all(balanced.gradients[n].any() for n in routers)


def test_sft_without_the_callback_has_the_balance_loss_too(tokens: Dataset, tmp_path: Path) -> None:
    """And so nothing to warn of, in either."""
    losses = []
    for callback in (False, True):
        trainer = trainer_of("sft", tokens, tmp_path, callback=callback, changes={"prune_step": 2}, max_steps=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?i)the balance loss")
            trainer.train()
        losses.append(trainer.losses)
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_a_loss_made_outside_the_model(tmp_path: Path) -> None:
    """DPO: it gets the balance loss of the trained forward, and the reference, the adapter off, counts nothing."""
    losses, balance = {}, 0.0
    for coef in (0.0, 2.0):
        torch.manual_seed(0)
        trainer = DPOTrainer(
            small_olmoe(),
            args=DPOConfig(**settings(tmp_path, max_steps=1, learning_rate=0.0, bf16=False, max_length=48)),
            train_dataset=preferences(4),
            processing_class=small_tokenizer(),
            peft_config=config_of(balance_loss_coef=coef, lora_dropout=0.0, prune_step=1),
        )
        trainer.add_callback(ExpertPruningCallback(trainer))
        forwards: list[torch.Tensor] = []
        inner = trainer.model.get_base_model()
        inner.register_forward_hook(lambda *_, t=trainer, f=forwards: f.append(t.model.auxiliary_loss().detach()))
        trainer.train()
        losses[coef] = trainer.state.log_history[0]["loss"]
        balance = float(forwards[-1])
    assert len(forwards) == 2  # the reference's and its own
    assert balance > 2.0
    assert losses[2.0] - losses[0.0] == pytest.approx(balance, abs=2e-3)
    assert trainer.model.peft_config["default"].kept_experts is not None


@pytest.fixture(scope="module")
def uninterrupted(tokens: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run for each kind of trainer, with dropout, saved after every step."""
    runs = {}
    for kind in ("trainer", "sft"):
        folder = tmp_path_factory.mktemp(kind)
        trainer = trainer_of(kind, tokens, folder, save_strategy="steps", save_steps=1)
        trainer.train()
        runs[kind] = trainer, folder
    return runs


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_prunes_once_and_saves_what_is_left(kind: str, uninterrupted: dict[str, Any]) -> None:
    trainer, folder = uninterrupted[kind]
    sizes = {}
    for step in range(1, LAST_STEP + 1):
        loaded = PeftModel.from_pretrained(small_olmoe(), folder / f"checkpoint-{step}")
        kept = loaded.peft_config["default"].kept_experts
        assert (kept is None) is (step < PRUNE_STEP)
        sizes[step] = loaded.num_parameters() - loaded.num_parameters(only_trainable=True), kept
    assert sizes[PRUNE_STEP] == sizes[LAST_STEP] and sizes[1] == sizes[2] and sizes[1][0] > sizes[LAST_STEP][0]
    model = trainer.model
    assert any(len(ids) < 4 for ids in model.peft_config["default"].kept_experts.values())
    for layer in layers_of(model).values():
        weight = layer.lora_A["default"].weight
        assert trainer.optimizer.state[weight]["exp_avg"].shape == weight.shape
    balance = next(iter(layers_of(model).values())).balance
    assert balance.adds_to_outputs and "compute_loss" not in vars(trainer)


@pytest.mark.parametrize("step", [2, PRUNE_STEP, 4], ids=["before", "at", "after"])
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_resumed_run_repeats_the_uninterrupted_one(
    kind: str, step: int, uninterrupted: dict[str, Any], tokens: Dataset, tmp_path: Path
) -> None:
    """Losses, weights and counters to the bit, dropout included; from a full adapter in each case."""
    run, folder = uninterrupted[kind]
    trainer = trainer_of(kind, tokens, tmp_path, seed=99)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert len(run.losses) == LAST_STEP and trainer.losses == run.losses[step:]
    assert_same(get_peft_model_state_dict(trainer.model), get_peft_model_state_dict(run.model))
    assert trainer.model.peft_config["default"].kept_experts == run.model.peft_config["default"].kept_experts


def test_the_best_checkpoint_may_be_one_from_before_pruning(tokens: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(
        "trainer",
        tokens,
        tmp_path,
        changes={"prune_step": 2},
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the highest loss: that of the first
        metric_for_best_model="eval_loss",
        label_names=["labels"],
    )
    trainer.train()
    best = PeftModel.from_pretrained(small_olmoe(), tmp_path / "checkpoint-1")
    assert_same(copied(get_peft_model_state_dict(trainer.model)), get_peft_model_state_dict(best))
    assert trainer.model.peft_config["default"].kept_experts is None


def test_with_the_defaults_of_sft(tokens: Dataset, tmp_path: Path) -> None:
    """bfloat16 autocast and gradient checkpointing; a share of the steps."""
    changes = {"prune_step": None, "prune_ratio": 0.5}
    trainer = trainer_of("sft", tokens, tmp_path, changes=changes, max_steps=4, bf16=True, gradient_checkpointing=True)
    trainer.train()
    assert trainer.model.peft_config["default"].kept_experts is not None
    counted = {int(layer.usage("default").tokens.sum()) for layer in layers_of(trainer.model).values()}
    assert len(counted) == 1, "layers saw different numbers of tokens"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda data, folder: trainer_of("trainer", data, folder, changes={"prune_step": 9}),
            "'default'.*step 9.* 5 steps",
        ),
        (lambda data, folder: _lora_trainer(data, folder), "has no LoRA experts"),
        (lambda data, folder: _of_another(data, folder), "added to another trainer"),
    ],
)
def test_refused_when_training_begins(make: Any, text: str, tokens: Dataset, tmp_path: Path) -> None:
    trainer = make(tokens, tmp_path)
    with pytest.raises(SieveError, match=text):
        trainer.train()
    assert not isinstance(trainer, Recording) or not hasattr(trainer, "losses")


def _lora_trainer(data: Dataset, folder: Path) -> Trainer:
    model = get_peft_model(small_olmoe(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = plain_trainer(model, data, folder, max_steps=1)
    trainer.add_callback(ExpertPruningCallback(trainer))
    return trainer


def _of_another(data: Dataset, folder: Path) -> Trainer:
    one, other = (trainer_of("trainer", data, folder, callback=False) for _ in range(2))
    one.add_callback(ExpertPruningCallback(other))
    return one


def test_needs_a_trainer() -> None:
    with pytest.raises(SieveError, match="ExpertPruningCallback .*Trainer.* str"):
        ExpertPruningCallback("trainer")
