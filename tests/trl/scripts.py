"""What the tests of TRL's trainers share: data, configurations, and what holds for LoRA as for a sieve adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import Trainer

from peft_sieve import SieveLoraConfig
from tests.models import small_olmoe
from tests.training.runs import copied

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def questions(count: int) -> list[dict[str, str]]:
    path = Path(__file__).parents[1] / "data" / "gsm8k_train_64.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def preferences(count: int) -> Dataset:
    """The answer against the beginning of another question's answer; short, for little work."""
    rows = questions(count)
    return Dataset.from_list(
        [
            {
                "prompt": row["question"][-60:],
                "chosen": " " + row["answer"][:50],
                "rejected": " " + other["answer"][:40],
            }
            for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
        ]
    )


def config_of(method: str, **settings: Any) -> LoraConfig:
    """LoRA on attention, as people use it on MoE models, or a sieve adapter."""
    common = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    if method == "lora":
        return LoraConfig(**common, target_modules=ATTENTION, **settings)
    if not settings.keys() & {"calib_dataset", "selected_experts"}:
        settings["selected_experts"] = {f"model.layers.{i}.mlp.experts": [i, 7 + i, 20] for i in range(6)}
    return SieveLoraConfig(**common, **settings)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def logged(trainer: Trainer) -> set[str]:
    return {name for entry in trainer.state.log_history for name in entry}


def assert_trained_like_lora(sieve: Trainer, lora: Trainer) -> None:
    """The same files and the same logged values, by name."""
    assert files(Path(sieve.args.output_dir)) == files(Path(lora.args.output_dir))
    assert logged(sieve) == logged(lora)


def assert_only_the_adapter_changed(trainer: Trainer, base: nn.Module | None = None) -> None:
    """Both factors of every adapter moved from where they began, and no other weight moved from where it was."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    before = copied((base or small_olmoe()).state_dict())
    for name, parameter in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in before:
            assert parameter.equal(before[plain]), name
    second = {k: v for k, v in get_peft_model_state_dict(model).items() if k.endswith(("_B.weight", "lora_B.weight"))}
    still_zero = [name for name, tensor in second.items() if not tensor.any()]
    assert second and not still_zero, still_zero
