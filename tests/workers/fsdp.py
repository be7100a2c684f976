"""One of the two processes of tests/training/test_fsdp.py: trains under accelerate's FSDP2, scenario by scenario.

    python -m tests.workers.fsdp FOLDER [SCENARIO ...]    (with RANK, LOCAL_RANK and WORLD_SIZE set, as torchrun does)

Without those, `train` trains on one process, with the rows of both in each batch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

from peft_sieve import LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from tests.models import randomize_adapter, small_tokenizer, tiny_model

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
PROCESS = 150  # a process that hangs ends after so many seconds
MASK = {f"model.layers.{i}.mlp.experts": [1, 4, 6] for i in range(2)}
COMMON: dict[str, Any] = {"r": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def rows() -> torch.Tensor:
    """(16, 24) tokens."""
    return torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(3))


def sieve(**settings: Any) -> SieveLoraConfig:
    return SieveLoraConfig(**{**COMMON, "selected_experts": MASK, **settings})


def calibrated() -> SieveLoraConfig:
    data = [{"input_ids": pair} for pair in rows()[:10].split(2)]  # five batches: one process has more than the other
    return sieve(selected_experts=None, calib_dataset=data, top_k=3)


@dataclass(frozen=True)
class Scenario:
    """Attributes:
    config: makes the adapter's configuration.
    engine: "accelerate" shards the model for the Trainer, "transformers" when it is loaded (`DistributedConfig`); "ddp"
        does not shard it.
    fsdp: of accelerate, settings of `fsdp_config`; a full state dict unless they say otherwise.
    arguments: of the Trainer, more of them.
    aux_loss: whether the routers' balance loss is added.
    sft: whether TRL's SFTTrainer trains.
    resumed: whether a second run goes on from the first one's checkpoint after two of the three steps.
    """

    config: Callable[[], Any] = sieve
    engine: str = "accelerate"
    fsdp: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    aux_loss: bool = False
    sft: bool = False
    resumed: bool = False


RAM: dict[str, Any] = {"cpu_ram_efficient_loading": True}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SCENARIOS = {
    "full": Scenario(resumed=True),
    "sharded": Scenario(fsdp={"state_dict_type": "SHARDED_STATE_DICT"}, resumed=True),
    "ram": Scenario(fsdp=RAM, resumed=True),
    "checkpointing": Scenario(fsdp={"activation_checkpointing": True}),
    "calibrated": Scenario(calibrated, fsdp=RAM),
    "shared": Scenario(lambda: sieve(cold_experts="shared", share_outer=True), fsdp=RAM),
    "perft_e": Scenario(lambda: PerftConfig(**COMMON, variant="E", selected_experts=MASK), fsdp=RAM),
    "lora_moe": Scenario(lambda: LoraMoeConfig(**COMMON, target_modules=["q_proj"], balance_loss_coef=0.0), fsdp=RAM),
    "sft": Scenario(fsdp=RAM, sft=True),
    "sft_aux_loss": Scenario(fsdp=RAM, sft=True, aux_loss=True),
    "native": Scenario(engine="transformers"),
    "native_calibrated": Scenario(calibrated, "transformers"),
    # All factors have gradients in each step, so that DDP need not look for those that have none.
    "ddp": Scenario(engine="ddp", arguments={"ddp_find_unused_parameters": False, **REENTRANT}),
    "ddp_aux_loss": Scenario(engine="ddp", arguments={"ddp_find_unused_parameters": False}, aux_loss=True),
}


class TakesRowsAsTheyAre:
    """So that two processes together see the batches of one."""

    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrder(TakesRowsAsTheyAre, Trainer):
    pass


class SFTInOrder(TakesRowsAsTheyAre, SFTTrainer):
    pass


def train(scenario: Scenario, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Three steps on four rows each; leaves the adapter in the folder."""
    several = WORLD > 1
    engine = scenario.engine if several else None
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which the arguments of another scenario have set
    settings: dict[str, Any] = dict(scenario.arguments) if several else {}
    if engine == "accelerate":
        defaults = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
        defaults["transformer_layer_cls_to_wrap"] = ["OlmoeDecoderLayer"]
        settings |= {"fsdp": True, "fsdp_config": {**defaults, **scenario.fsdp}, "ddp_backend": "gloo"}
    elif several:
        settings["ddp_backend"] = "gloo"
    kind: Any = TrainingArguments
    if scenario.sft:
        kind = SFTConfig
        settings["router_aux_loss_coef"] = None if scenario.aux_loss else 0.0  # None is the model's own
    arguments = kind(
        output_dir=str(folder / "run"),
        max_steps=3,
        save_steps=2,
        save_strategy="steps" if scenario.resumed and several else "no",
        per_device_train_batch_size=4 // WORLD,
        learning_rate=5e-3,
        adam_epsilon=1e-3,  # or gradients of nothing but rounding move weights as others do
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,  # SFTConfig has it on, and then the losses differ by rounding
        disable_tqdm=True,
        **settings,
    )
    if engine == "accelerate":
        arguments.device  # noqa: B018 (makes the state that is changed)
        # accelerate shards on accelerators only; all that this changes is which branch it takes.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    base = tiny_model("olmoe", output_router_logits=scenario.aux_loss)
    if engine == "transformers":
        if RANK == 0:
            base.save_pretrained(folder / "base")
        dist.barrier()
        base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=DistributedConfig(fsdp_size=2))
    model = get_peft_model(base, scenario.config())
    randomize_adapter(model)
    data = Dataset.from_dict({"input_ids": rows().tolist(), "labels": rows().tolist()})
    if scenario.sft:
        trainer: Any = SFTInOrder(model, arguments, train_dataset=data, processing_class=small_tokenizer())
    else:
        trainer = InOrder(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2") if resume else None)
    trainer.save_model(str(folder / ("resumed" if resume else "adapter")))
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def refused(folder: Path, parallel: DistributedConfig) -> dict[str, Any]:
    """What adapting a model that transformers has spread in another way is refused with, before calibration."""
    if RANK == 0:
        tiny_model("olmoe").save_pretrained(folder / "base")
    dist.barrier()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=parallel)
    try:
        get_peft_model(base, calibrated())
    except SieveError as error:
        return {"refusal": str(error), "untouched": not any("lora_" in name for name, _ in base.named_modules())}
    return {"refusal": None}


REFUSED = {
    "tensor_parallel": DistributedConfig(tp_size=2),
    "expert_parallel": DistributedConfig(fsdp_size=2, ep_size=2),
}


def main(folder: Path, *names: str) -> None:
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=RANK, world_size=WORLD)

    def record(name: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            outcome = run()
        except Exception:  # the test shows it
            outcome = {"crash": traceback.format_exc()}
        (folder / f"{name}.{RANK}.json").write_text(json.dumps(outcome))

    for name in names or (*SCENARIOS, *REFUSED):
        if name in REFUSED:
            record(name, partial(refused, folder / name, REFUSED[name]))
            continue
        record(name, partial(train, SCENARIOS[name], folder / name))
        if SCENARIOS[name].resumed:
            record(f"{name}.resumed", partial(train, SCENARIOS[name], folder / name, resume=True))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(PROCESS, exit=True)
    main(Path(sys.argv[1]), *sys.argv[2:])
