"""Drift of routing in the Trainer's logs, against a count token by token of the same batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_sieve import (
    EpngCallback,
    EpngConfig,
    ExpertSelection,
    RoutingDriftCallback,
    SieveError,
    SieveLoraConfig,
    profile_routing,
)
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.drift import routing_drift
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, small_olmoe, small_tokenizer
from tests.module_models import jetmoe, switch_transformers

STEPS, EVERY = 6, 2
LAYERS, EXPERTS = 6, 32
TOP_K = 4


@pytest.fixture(scope="module")
def texts() -> Dataset:
    path = Path(__file__).parents[1] / "data" / "gsm8k_train_64.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()][:24]
    # Of different lengths, so that batches are padded.
    return Dataset.from_list([{"text": row["question"][: 30 + 9 * i]} for i, row in enumerate(rows)])


@pytest.fixture(scope="module")
def tokens(texts: Dataset) -> Dataset:
    encoded = small_tokenizer()(list(texts["text"]), truncation=True, max_length=40)
    return Dataset.from_dict({"input_ids": encoded["input_ids"]})


def config(mask: dict[str, list[int]] | None = None, **settings: Any) -> SieveLoraConfig:
    mask = mask or {f"model.layers.{i}.mlp.experts": list(range(i, i + 8)) for i in range(LAYERS)}
    return SieveLoraConfig(
        **{"r": 4, "selected_experts": mask, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **settings}
    )


class Recounting:
    """Mixed into a trainer: before every step, routes its batch once more and notes each real token's experts."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        if getattr(self, "recount", True):
            self.routed = getattr(self, "routed", {})
            self.routed.setdefault(step, []).append(routed_tokens(model, inputs))
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


class RecountingTrainer(Recounting, Trainer):
    pass


class RecountingSFTTrainer(Recounting, SFTTrainer):
    pass


def routed_tokens(model: nn.Module, inputs: dict[str, Any]) -> list[list[tuple[list[int], list[float]]]]:
    """Layer -> real token -> the experts it goes to, and their weights, as the routers return them."""
    found: list[list[tuple[list[int], list[float]]]] = []
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    real = mask.reshape(-1).tolist()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        _, weights, ids = output
        pairs = zip(ids.tolist(), weights.tolist(), real, strict=True)
        found.append([(i, w) for i, w, kept in pairs if kept])

    routers = [m for m in model.modules() if type(m).__name__ == "OlmoeTopKRouter"]
    handles = [router.register_forward_hook(look) for router in routers]
    try:
        with torch.no_grad():
            keys = ("input_ids", "attention_mask", "position_ids")
            model(**{k: inputs[k] for k in keys if k in inputs}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == LAYERS
    return found


def expected(
    batches: list[list[list[tuple[list[int], list[float]]]]], mask: dict[str, list[int]], mass: bool
) -> dict[str, float]:
    jaccard = coverage = 0.0
    for layer, adapted in enumerate(mask.values()):
        scores = [0.0] * EXPERTS
        for batch in batches:
            for ids, weights in batch[layer]:
                for expert, weight in zip(ids, weights, strict=True):
                    scores[expert] += weight if mass else 1
        hot = set(sorted(range(EXPERTS), key=lambda e: (-scores[e], e))[: len(adapted)])
        jaccard += len(hot & set(adapted)) / len(hot | set(adapted)) / LAYERS
        coverage += sum(scores[e] for e in adapted) / sum(scores) / LAYERS
    tokens = sum(len(batch[0]) for batch in batches)
    return {"routing_jaccard": jaccard, "routing_coverage": coverage, "routing_tokens": tokens}


class Tracker(TrainerCallback):
    """Keeps what a tracker is told."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append({**logs, "step": state.global_step})


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def plain(tokens: Dataset, folder: Path, peft_config: Any = None, **changes: Any) -> RecountingTrainer:
    torch.manual_seed(0)
    model = get_peft_model(small_olmoe(), peft_config or config())
    randomize_adapters(model, std=0.02)
    return RecountingTrainer(
        model=model,
        args=TrainingArguments(**settings(folder, **changes)),
        train_dataset=tokens,
        eval_dataset=tokens.select(range(3)),
        data_collator=DataCollatorForLanguageModeling(small_tokenizer(), mlm=False),
        callbacks=[Tracker()],
    )


def sft(texts: Dataset, folder: Path, peft_config: Any = None, **changes: Any) -> RecountingSFTTrainer:
    return RecountingSFTTrainer(
        model=small_olmoe(),
        args=SFTConfig(**settings(folder, max_length=40, **changes)),
        train_dataset=texts,
        peft_config=peft_config or config(),
        callbacks=[Tracker()],
    )


def tracked(trainer: Any) -> list[dict[str, float]]:
    (tracker,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Tracker)]
    return tracker.entries


def check_logs(trainer: Any, every: int = EVERY, mass: bool = False) -> None:
    """What the tracker and the history hold is what a count token by token gives."""
    mask = trainer.model.peft_config["default"].selected_experts
    entries = [entry for entry in tracked(trainer) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(2, STEPS + 1, 2))
    others = [entry for entry in tracked(trainer) if "loss" not in entry]
    assert others, "the summary at the end"
    assert not any(key.startswith("routing_") for entry in others for key in entry)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, kept in zip(entries, history, strict=True):
        steps = [step for step in range(entry["step"] - 2, entry["step"]) if step % every == 0]
        batches = [batch for step in steps for batch in trainer.routed[step]]
        found = {key: value for key, value in entry.items() if key.startswith("routing_")}
        assert found == {key: value for key, value in kept.items() if key.startswith("routing_")}
        assert found == (pytest.approx(expected(batches, mask, mass), rel=1e-6) if batches else {})


CASES: dict[str, Callable[..., Any]] = {
    "plain": lambda tokens, texts, path: plain(tokens, path),
    "evaluating": lambda tokens, texts, path: plain(tokens, path, eval_strategy="steps", eval_steps=1),
    "accumulating": lambda tokens, texts, path: plain(tokens, path, gradient_accumulation_steps=2),
    "checkpointing": lambda tokens, texts, path: plain(
        tokens, path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "reentrant": lambda tokens, texts, path: plain(
        tokens, path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "mass": lambda tokens, texts, path: plain(tokens, path, config(score="mass")),
    # TRL's defaults: autocast to bfloat16 and gradient checkpointing.
    "sft": lambda tokens, texts, path: sft(texts, path),
    "sft packed": lambda tokens, texts, path: sft(texts, path, packing=True, bf16=False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_log_holds_what_the_batches_give(case: str, tokens: Dataset, texts: Dataset, tmp_path: Path) -> None:
    trainer = CASES[case](tokens, texts, tmp_path)
    trainer.add_callback(RoutingDriftCallback(trainer, every=EVERY))
    # Under autocast the trainer's own forward is wrapped, so that the recount runs in the same type.
    trainer.train()
    check_logs(trainer, mass=case == "mass")


def test_a_log_without_a_counted_step_has_none(tokens: Dataset, tmp_path: Path) -> None:
    trainer = plain(tokens, tmp_path)
    trainer.add_callback(RoutingDriftCallback(trainer, every=4))
    trainer.train()
    check_logs(trainer, every=4)
    assert ["routing_tokens" in entry for entry in tracked(trainer) if "loss" in entry] == [True, False, True]


def test_values_move_with_the_mask(tokens: Dataset, tmp_path: Path) -> None:
    """The mask of the same batches gives a Jaccard of one, its complement a small one."""
    trainer = plain(tokens, tmp_path, learning_rate=0.0)
    trainer.add_callback(RoutingDriftCallback(trainer, every=1))
    trainer.train()
    batches = [batch for step in (0, 1) for batch in trainer.routed[step]]
    counts = [[0] * EXPERTS for _ in range(LAYERS)]
    for batch in batches:
        for layer, routed in enumerate(batch):
            for ids, _ in routed:
                for expert in ids:
                    counts[layer][expert] += 1
    ranked = [sorted(range(EXPERTS), key=lambda e: (-row[e], e)) for row in counts]
    values = []
    for part in (slice(0, 8), slice(-8, None)):
        mask = {f"model.layers.{i}.mlp.experts": sorted(order[part]) for i, order in enumerate(ranked)}
        again = plain(tokens, tmp_path, config(mask), learning_rate=0.0)
        for name, parameter in again.model.named_parameters():
            if "lora_" in name:
                parameter.data.zero_()
        again.add_callback(RoutingDriftCallback(again, every=1))
        again.train()
        values.append(tracked(again)[0])
    assert values[0]["routing_jaccard"] > 0.6 > 0.1 > values[1]["routing_jaccard"]
    assert values[0]["routing_coverage"] > 0.4 > 0.1 > values[1]["routing_coverage"]


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_training_is_the_same_to_the_bit(kind: str, tokens: Dataset, texts: Dataset, tmp_path: Path) -> None:
    """Dropout and gradient checkpointing included."""

    def run(watched: bool) -> Any:
        torch.manual_seed(0)
        with_dropout = config(lora_dropout=0.2)
        trainer = sft(texts, tmp_path, with_dropout) if kind == "sft" else plain(tokens, tmp_path, with_dropout)
        trainer.recount = False
        if watched:
            trainer.add_callback(RoutingDriftCallback(trainer, every=1))
        trainer.train()
        return trainer

    without, watched = run(False), run(True)
    assert "routing_jaccard" in tracked(watched)[0]
    assert "routing_jaccard" not in tracked(without)[0]
    assert len(watched.losses) == STEPS
    assert watched.losses == without.losses
    weights = get_peft_model_state_dict(watched.model)
    for name, weight in get_peft_model_state_dict(without.model).items():
        assert torch.equal(weight, weights[name]), name


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def fail(trainer: Any, where: str) -> int:
    """Train until step `EVERY`, and fail there; returns the number of hooks during the last forward."""
    layer = trainer.model.get_submodule("base_model.model.model.layers.3")
    during: list[int] = []

    def on_forward(*args: Any) -> None:
        if torch.is_grad_enabled():
            during.append(num_hooks(trainer.model))
            if where == "forward" and trainer.state.global_step == EVERY:
                raise RuntimeError("no forward")

    def on_backward(*args: Any) -> None:
        if where == "backward" and trainer.state.global_step == EVERY:
            raise RuntimeError("no backward")

    handles = [layer.register_forward_hook(on_forward), layer.register_full_backward_hook(on_backward)]
    try:
        with pytest.raises(RuntimeError, match=f"no {where}"):
            trainer.train()
    finally:
        for handle in handles:
            handle.remove()
    return during[-1]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_left_behind(where: str, tokens: Dataset, tmp_path: Path) -> None:
    trainer = plain(tokens, tmp_path)
    during = fail(trainer, where)  # transformers leaves hooks of its own in a model that has run
    hooks, own = num_hooks(trainer.model), set(vars(trainer))
    trainer.add_callback(RoutingDriftCallback(trainer, every=EVERY))
    assert fail(trainer, where) > during
    assert num_hooks(trainer.model) == hooks

    # Again, in full: as if nothing had been.
    trainer.routed.clear()
    tracked(trainer).clear()
    trainer.train()
    assert num_hooks(trainer.model) == hooks
    assert set(vars(trainer)) == own
    check_logs(trainer)


def test_a_reference_model_does_not_count(texts: Dataset, tmp_path: Path) -> None:
    """DPO routes every batch twice, once with the adapter off; only the other time is traffic of the adapter."""
    rows = Dataset.from_list([{"prompt": text[:20], "chosen": text[20:], "rejected": " no"} for text in texts["text"]])
    trainer = DPOTrainer(
        small_olmoe(),
        args=DPOConfig(**settings(tmp_path, max_length=40, bf16=False)),
        train_dataset=rows,
        peft_config=config(),
        processing_class=small_tokenizer(),
        callbacks=[Tracker()],
    )
    seen: list[int] = []
    trainer.add_callback(RoutingDriftCallback(trainer, every=1))
    collate = trainer.data_collator

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        seen.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    logged = [entry["routing_tokens"] for entry in tracked(trainer) if "loss" in entry]
    assert logged == [sum(seen[i : i + 2]) for i in range(0, STEPS, 2)]


@pytest.mark.parametrize("make", [switch_transformers, jetmoe, deepseek_like])
def test_other_layouts_count_as_profiling_does(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Encoder and decoder with padding of their own, stacks in the block that routes, a list of modules."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 128, (length,), generator=generator).tolist(), "length": length}
        for length in (12, 5, 9, 11, 7, 12)
    ]
    seen: list[dict[str, torch.Tensor]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask, labels = torch.zeros(3, 12).long(), torch.zeros(3, 12).long(), torch.full((3, 12), -100)
        for i, row in enumerate(rows):
            length = row["length"]
            ids[i, :length], mask[i, :length] = torch.tensor(row["input_ids"]), 1
            labels[i, : length - 3] = ids[i, : length - 3]
        seen.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return dict(seen[-1])

    mask = {layer.path: [0, 2, 5] for layer in find_moe_layers(model)}
    peft_model = get_peft_model(model, SieveLoraConfig(r=4, selected_experts=mask, score="mass", lora_dropout=0.0))
    arguments = TrainingArguments(**settings(tmp_path, learning_rate=0.0, max_steps=2, remove_unused_columns=False))
    trainer = Trainer(peft_model, arguments, collate, Dataset.from_list(rows))
    trainer.add_callback(RoutingDriftCallback(trainer, every=1))
    trainer.train()
    logged = trainer.state.log_history[0]
    # The factors are as initialised, so that the model routes as its base.
    profile = profile_routing(peft_model, seen[:2])
    drift = routing_drift(profile, ExpertSelection(mask), score="mass")
    assert logged["routing_jaccard"] == pytest.approx(drift.jaccard)
    assert logged["routing_coverage"] == pytest.approx(drift.coverage, rel=1e-5)
    routed = max(int(counts.sum()) for counts in profile.counts.values())
    assert logged["routing_tokens"] == routed // profile.num_experts_per_tok


@pytest.mark.parametrize("score", ["esft_gate", "esft_token"])
def test_averages_over_samples_are_taken_over_tokens(score: str, tokens: Dataset, tmp_path: Path) -> None:
    logs = []
    for name in (score, {"esft_gate": "mass", "esft_token": "count"}[score]):
        trainer = plain(tokens, tmp_path, config(score=name), max_steps=2, logging_steps=1)
        trainer.add_callback(RoutingDriftCallback(trainer, every=1))
        trainer.train()
        logs.append([entry["routing_coverage"] for entry in trainer.state.log_history if "routing_coverage" in entry])
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_what_cold_experts_share_is_not_in_the_mask(tokens: Dataset, tmp_path: Path) -> None:
    trainer = plain(tokens, tmp_path, config(cold_experts="shared", share_outer=True))
    trainer.add_callback(RoutingDriftCallback(trainer, every=EVERY))
    trainer.train()
    check_logs(trainer)


def test_the_mask_is_that_of_the_moment(tokens: Dataset, tmp_path: Path) -> None:
    """EPnG's moves."""
    given = EpngConfig(r=2, lora_alpha=4, warmup_steps=1, update_interval=1, prune_ratio=0.5, task_type="CAUSAL_LM")
    trainer = plain(tokens, tmp_path, given, max_steps=3, logging_steps=1)
    trainer.add_callback(EpngCallback())
    trainer.add_callback(RoutingDriftCallback(trainer, every=1))
    trainer.train()
    coverage = [entry["routing_coverage"] for entry in trainer.state.log_history if "routing_coverage" in entry]
    assert len(coverage) == 3 and coverage[-1] < 0.95  # of all experts it would be 1


def test_what_is_refused(tokens: Dataset, tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(small_tokenizer(), mlm=False)

    def trainer_of(model: nn.Module) -> Trainer:
        return Trainer(model, TrainingArguments(**settings(tmp_path)), collator, tokens)

    for model in (
        small_olmoe(),
        get_peft_model(small_olmoe(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ):
        with pytest.raises(SieveError, match="has 0 active sieve adapters on expert layers"):
            RoutingDriftCallback(trainer_of(model))
    trainer = plain(tokens, tmp_path)
    for every in (0, -1, 1.5, True, None):
        with pytest.raises(SieveError, match=f"^every .*whole number.*{every}"):
            RoutingDriftCallback(trainer, every=every)  # type: ignore[arg-type]
    with pytest.raises(SieveError, match="RoutingDriftCallback .*OlmoeForCausalLM"):
        RoutingDriftCallback(small_olmoe())  # type: ignore[arg-type]
    trainer.args.torch_compile = True
    with pytest.raises(SieveError, match="torch_compile=True.*RoutingDriftCallback"):
        RoutingDriftCallback(trainer)
    trainer.args.torch_compile = False
    plain_mlp = trainer.model.get_base_model().model.layers[0].mlp
    plain_mlp.compile(backend="eager")
    with pytest.raises(SieveError, match="RoutingDriftCallback does not support a compiled model"):
        RoutingDriftCallback(trainer)
    plain_mlp._compiled_call_impl = None
    everything = {"cold_experts": "shared", "mask": {f"model.layers.{i}.mlp.experts": [] for i in range(LAYERS)}}
    with pytest.raises(SieveError, match="'default' has no selected experts .*Leave RoutingDriftCallback out"):
        RoutingDriftCallback(plain(tokens, tmp_path, config(**everything)))
    trainer.args._n_gpu = 2
    with pytest.raises(SieveError, match="one process over 2 GPUs"):
        RoutingDriftCallback(trainer)
    other = plain(tokens, tmp_path)
    other.add_callback(RoutingDriftCallback(plain(tokens, tmp_path)))
    with pytest.raises(SieveError, match="another trainer than it was made with"):
        other.train()
