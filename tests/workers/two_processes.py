"""One of the two processes of tests/training/test_distributed.py: goes through scenarios, writes how each ended.

    python -m tests.workers.two_processes FOLDER    (with RANK, LOCAL_RANK and WORLD_SIZE set, as torchrun does)

Every scenario has a process group of its own, so that one that hangs or leaves its peer alone does not spoil the next.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from peft_sieve import (
    RoutingDriftCallback,
    RoutingProfile,
    SieveError,
    SieveLoraConfig,
    profile_routing,
    select_experts,
)
from tests.models import small_olmoe, small_tokenizer
from tests.workers.sharded import train_sharded

RANK = int(os.environ["RANK"])
# A collective that no one joins fails after COLLECTIVE seconds; a process that hangs elsewhere ends after PROCESS.
COLLECTIVE, PROCESS = 40, 150
NUM_LAYERS, NUM_EXPERTS = 6, 32

rows = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "gsm8k_train_64.jsonl").read_text("utf-8").splitlines()
]
texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows[:20]]


def config(**settings: Any) -> SieveLoraConfig:
    defaults = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "calib_max_length": 48, "calib_batch_size": 4}
    return SieveLoraConfig(**{**defaults, **settings})


def mask_from(first: int) -> dict[str, list[int]]:
    """Eight experts of each layer."""
    return {f"model.layers.{i}.mlp.experts": list(range(first, first + 8)) for i in range(NUM_LAYERS)}


def batches(column: str) -> list[dict[str, torch.Tensor]]:
    """Six batches that are ready for the model, made of questions or of answers."""
    encoded = small_tokenizer()([row[column] for row in rows[:24]], return_tensors="pt", padding=True)
    ids, attention_mask = encoded["input_ids"][:, :32], encoded["attention_mask"][:, :32]
    return [{"input_ids": ids[i : i + 4], "attention_mask": attention_mask[i : i + 4]} for i in range(0, 24, 4)]


# Alone, before the processes are connected


def mask_of_summed_counts() -> dict[str, Any]:
    """What two processes must come to, if each takes every second batch of its own data."""
    model = small_olmoe()
    alone = {column: profile_routing(model, batches(column)) for column in ("question", "answer")}
    shares = [profile_routing(model, batches("question")[0::2]), profile_routing(model, batches("answer")[1::2])]
    uneven = profile_routing(model, batches("question")[0::2]) + profile_routing(model, batches("answer")[1:2])
    counts = {path: sum(share.counts[path] for share in shares) for path in shares[0].counts}
    total = RoutingProfile.from_arrays(torch.stack(list(counts.values())), layer_names=list(counts))
    return {
        "mask": select_experts(total).to_dict(),
        "uneven": {"mask": select_experts(uneven).to_dict(), "tokens": uneven.num_tokens},
        "tokens": sum(share.num_tokens for share in shares),
        **{column: select_experts(profile).to_dict() for column, profile in alone.items()},
    }


def calibrate_on_texts() -> dict[str, Any]:
    model = get_peft_model(small_olmoe(), config(calib_dataset=texts))
    return {"mask": model.peft_config["default"].selected_experts, **model.peft_config["default"].calibration}


# Together


def calibrate_on_different_data() -> dict[str, Any]:
    model = get_peft_model(small_olmoe(), config(calib_dataset=batches(("question", "answer")[RANK])))
    return {"mask": model.peft_config["default"].selected_experts, **model.peft_config["default"].calibration}


def calibrate_until_stable(threshold: float) -> Callable[[], Any]:
    """Process 0 has three batches to take, process 1 only one; they have to stop together."""

    def scenario() -> dict[str, Any]:
        data = batches(("question", "answer")[RANK])[: (6, 2)[RANK]]
        model = get_peft_model(small_olmoe(), config(calib_dataset=data, calib_stability=threshold))
        return {"mask": model.peft_config["default"].selected_experts, **model.peft_config["default"].calibration}

    return scenario


def refused(*settings: dict[str, Any]) -> Callable[[], Any]:
    """Adapt a model with the settings of this rank; the outcome says whether it was left without adapters."""

    return lambda: refused_on(small_olmoe(), settings[RANK])


def refused_on(base: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        get_peft_model(base, config(**settings))
    except SieveError as error:
        return {"refusal": str(error), "untouched": not any("lora_" in name for name, _ in base.named_modules())}
    return {"refusal": None}


def first_forward(model: nn.Module) -> Callable[[], Any]:
    """Training with DDP of adapters that were made before there was a process group."""

    def scenario() -> dict[str, Any]:
        ids = torch.arange(100, 124).reshape(2, 12)
        # Buffers broadcast from rank 0 would hide from rank 1 that it holds another mask.
        parallel = DistributedDataParallel(model.train(), broadcast_buffers=False)
        try:
            parallel(input_ids=ids, labels=ids)
        except SieveError as error:
            return {"refusal": str(error)}
        return {"refusal": None}

    return scenario


def routing_of_each_forward(model: nn.Module) -> list[dict[str, Any]]:
    """A list that grows with each forward: its real tokens, and how many of them each layer sends to each expert."""
    seen: list[dict[str, Any]] = []

    def on_forward(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({"mask": kwargs["attention_mask"].flatten().tolist(), "counts": []})

    def on_routing(module: nn.Module, args: Any, output: Any) -> None:
        counts = [0] * NUM_EXPERTS
        for ids, real in zip(output[2].tolist(), seen[-1]["mask"], strict=True):
            for expert in ids if real else ():
                counts[expert] += 1
        seen[-1]["counts"].append(counts)

    model.register_forward_pre_hook(on_forward, with_kwargs=True)
    for module in model.modules():
        if type(module).__name__ == "OlmoeTopKRouter":
            module.register_forward_hook(on_routing)
    return seen


def train_three_steps(model: PeftModel, folder: Path) -> Callable[[], Any]:
    def scenario() -> dict[str, Any]:
        tokenizer = small_tokenizer()
        arguments = TrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
        )
        encoded = tokenizer(texts, truncation=True, max_length=32)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": encoded["input_ids"]}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.add_callback(RoutingDriftCallback(trainer, every=1))
        seen = routing_of_each_forward(model)
        initial = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        save_file(initial, folder / f"initial.{RANK}.safetensors")
        save_file(get_peft_model_state_dict(model), folder / f"trained.{RANK}.safetensors")
        return {
            "world_size": arguments.world_size,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "drift": [
                {key: value for key, value in entry.items() if key.startswith("routing_")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            "seen": seen,
        }

    return scenario


def left_alone() -> dict[str, Any]:
    """Process 1 ends in the middle of its calibration."""
    base = small_olmoe()
    if RANK == 1:
        base.model.layers[2].register_forward_pre_hook(lambda *args: os._exit(0))
    return refused_on(base, {"calib_dataset": texts})


@contextmanager
def connected(folder: Path, name: str) -> Iterator[None]:
    dist.init_process_group(
        "gloo",
        init_method=(folder / f"{name}.store").as_uri(),
        rank=RANK,
        world_size=2,
        timeout=datetime.timedelta(seconds=COLLECTIVE),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    def record(name: str, scenario: Callable[[], Any], together: bool = True) -> None:
        try:
            if together:
                with connected(folder, name):
                    outcome = scenario()
            else:
                outcome = scenario()
        except Exception:  # the test shows it
            outcome = {"crash": traceback.format_exc()}
        (folder / f"{name}.{RANK}.json").write_text(json.dumps(outcome), encoding="utf-8")

    # Different initial adapters on the two ranks, and for one scenario different masks of the same size.
    torch.manual_seed(RANK)
    divided = get_peft_model(small_olmoe(), config(selected_experts=mask_from(RANK * 8)))
    native = small_olmoe()  # through transformers, which keeps the layers and drops the tuner
    native.add_adapter(config(selected_experts=mask_from(RANK * 8)))
    # Of one expert, the factors have one shape under both.
    one = {path: ids[:1] for path, ids in mask_from(8).items()}
    differing = get_peft_model(small_olmoe(), config(selected_experts=one, share_outer=RANK == 1))
    agreeing = get_peft_model(small_olmoe(), config(selected_experts=mask_from(8)))
    if RANK == 0:
        record("alone_on_texts", calibrate_on_texts, together=False)
    else:
        record("alone_summed", mask_of_summed_counts, together=False)

    record("different_data", calibrate_on_different_data)
    record("same_data", calibrate_on_texts)
    record("stable_at_once", calibrate_until_stable(0.01))
    record("never_stable", calibrate_until_stable(1.0))
    mask, other_mask = ({"selected_experts": mask_from(first)} for first in (0, 8))
    data = {"calib_dataset": texts}
    record("different_masks", refused(mask, other_mask))
    record("different_cold_experts", refused(mask, {**mask, "cold_experts": "shared"}))
    record("mask_and_calibration", refused(mask, data))
    record("empty_data", refused(data, {"calib_dataset": []}))
    record("masks_made_before_connecting", first_forward(divided))
    record("native_masks_made_before_connecting", first_forward(native))
    record("settings_made_before_connecting", first_forward(differing))
    record("training", train_three_steps(agreeing, folder))
    record("sharded", lambda: train_sharded(RANK, folder / "sharded"))
    record("left_alone", left_alone)  # last, since it ends one of the processes


if __name__ == "__main__":
    faulthandler.dump_traceback_later(PROCESS, exit=True)
    main(Path(sys.argv[1]))
