"""`GRPOTrainer`: generation inside the loop, the reference, and the merged weights that it sends to vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from tests.models import randomize_adapters, small_olmoe, small_tokenizer, tiny_model
from tests.training.runs import assert_same, copied, settings
from tests.trl.scripts import assert_only_the_adapter_changed, assert_trained_like_lora, config_of, questions


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": row["question"][-60:], "answer": row["answer"]} for row in questions(4)])


def variety(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between the completions of a prompt."""
    return [len(set(completion)) / 10 for completion in completions]


def grpo(model: nn.Module, peft_config: Any, data: Dataset, folder: Path, **changes: Any) -> GRPOTrainer:
    fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    return GRPOTrainer(
        model=model,
        reward_funcs=variety,
        args=GRPOConfig(
            **settings(folder, num_generations=4, max_completion_length=6, beta=0.1, **{**fixed, **changes})
        ),
        train_dataset=data,
        processing_class=small_tokenizer(),
        peft_config=peft_config,
    )


def test_trains_on_what_the_adapted_model_generates(prompts: Dataset, tmp_path: Path) -> None:
    trainers = {}
    for method in ("lora", "sieve"):
        settings_of = {"calib_dataset": prompts, "calib_formatting_func": lambda row: row["prompt"] + row["answer"]}
        config = config_of(method, **(settings_of if method == "sieve" else {}))
        trainer = grpo(small_olmoe(), config, prompts, tmp_path / method, save_strategy="steps", save_steps=1)
        trainer.train()
        trainers[method] = trainer
    assert_trained_like_lora(trainers["sieve"], trainers["lora"])
    assert_only_the_adapter_changed(trainers["sieve"])
    first, second = trainers["sieve"].state.log_history[:2]
    # Nothing was learned before the first step, so the policy is the reference there, and not after it.
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-4
    assert first["reward_std"] > 0

    resumed = grpo(small_olmoe(), config, prompts, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "sieve" / "checkpoint-1"))
    assert_same(get_peft_model_state_dict(resumed.model), get_peft_model_state_dict(trainers["sieve"].model))


def test_a_loaded_adapter_is_its_own_first_reference(prompts: Dataset, tmp_path: Path) -> None:
    start = get_peft_model(small_olmoe(), config_of("sieve"))
    randomize_adapters(start, std=0.05)
    start.save_pretrained(tmp_path / "start")
    model = PeftModel.from_pretrained(small_olmoe(), tmp_path / "start", is_trainable=True)
    before = copied(get_peft_model_state_dict(model))
    trainer = grpo(model, None, prompts, tmp_path / "run", disable_dropout=True)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-4
    assert_same(get_peft_model_state_dict(trainer.model, adapter_name="ref"), before)


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_weights_for_vllm_are_the_merged_ones_under_the_names_of_the_base_model(name: str) -> None:
    """What TRL reads between its `merge_adapter` and `unmerge_adapter`, without the server that it sends it to."""
    base = tiny_model(name)
    plain = copied(dict(base.named_parameters()))
    experts = [path for path, module in base.named_modules() if path.endswith("mlp.experts")]
    config = config_of("sieve", selected_experts={path: [1, 4] for path in experts})
    model = get_peft_model(base, config)
    randomize_adapters(model)
    with_adapter = copied(model.state_dict())

    backend = DistributedBackend(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None)))
    sender = SimpleNamespace(model=model, _dist=backend)
    sender._fix_param_name_to_vllm = lambda *args, **kwargs: VLLMGeneration._fix_param_name_to_vllm(
        sender, *args, **kwargs
    )
    sent = {name: tensor.clone() for name, tensor in VLLMGeneration._iter_named_params(sender)}

    assert_same(model.state_dict(), with_adapter)
    merged = dict(model.merge_and_unload().named_parameters())
    assert_same(sent, merged)
    assert sent.keys() == plain.keys()
    changed = {name for name in sent if not sent[name].equal(plain[name])}
    assert all(any(name.startswith(path) for name in changed) for path in experts)
