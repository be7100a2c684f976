"""Averages of adapters: teachers that follow a student, averages of checkpoints, state dicts in another type."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from transformers import TrainingArguments
from trl.experimental.sdpo.teacher_sync import PEFTAdapterEMACallback

from peft_sieve import LoraMoeConfig, SieveError, SieveLoraConfig
from peft_sieve.tuners.common.bookkeeping import scale_of
from peft_sieve.tuners.common.experts.factors import slots_of
from tests.models import randomize_adapter, randomize_adapters, tiny_model, token_batch
from tests.tuners.test_injection import CONFIGS

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
MASK = {FIRST: [1, 2, 5], SECOND: [0, 3, 4]}
# Of as many experts, all of them and their slots halfway between MASK's and others'.
OTHER = {FIRST: [1, 2, 6], SECOND: [0, 3, 4]}
METHODS: dict[str, Callable[[], Any]] = {
    **{name: CONFIGS[name] for name in ("epng", "perft_e", "lora_moe")},
    "sieve": lambda: SieveLoraConfig(r=2, selected_experts=MASK, task_type="CAUSAL_LM"),
    "shared": lambda: SieveLoraConfig(
        r=2, selected_experts=MASK, cold_experts="shared", share_outer=True, task_type="CAUSAL_LM"
    ),
    "hellori": lambda: SieveLoraConfig(r=2, selected_experts=MASK, hellori_density=0.5, task_type="CAUSAL_LM"),
}
each_method = pytest.mark.parametrize("method", METHODS)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


def adapted(method: str, seed: int) -> PeftModel:
    model = get_peft_model(tiny_model("olmoe"), METHODS[method]())
    randomize_adapter(model, seed=seed)
    return model


def own(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """The parameters of an adapter, by names without its own."""
    named = model.named_parameters()
    return {key.replace(f".{name}.", "."): value.data.clone() for key, value in named if f".{name}." in key}


def with_parameters(method: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The outputs of an adapter that was given them one by one."""
    model = adapted(method, 0)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data.copy_(values[name.replace(".default.", ".")])
    return logits(model)


def mixed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    return {key: share * value + (1 - share) * second[key] for key, value in first.items()}


@each_method
@pytest.mark.parametrize("share", [0.995, 1 / 3])
def test_an_average_is_loaded(method: str, share: float, tmp_path: Path) -> None:
    first, second = adapted(method, 1), adapted(method, 2)
    expected = with_parameters(method, mixed(own(first), own(second), share))
    state = mixed(get_peft_model_state_dict(first), get_peft_model_state_dict(second), share)

    model = adapted(method, 3)
    set_peft_model_state_dict(model, state)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    exact = {key: value.dtype for key, value in get_peft_model_state_dict(first).items()}
    assert {key: value.dtype for key, value in get_peft_model_state_dict(model).items()} == exact

    model = adapted(method, 3)
    model.load_state_dict(mixed(first.state_dict(), second.state_dict(), share))
    assert torch.allclose(logits(model), expected, atol=1e-5)

    first.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)), expected, atol=1e-5)
    base = tiny_model("olmoe")
    base.load_adapter(str(tmp_path))
    assert torch.allclose(logits(base), expected, atol=1e-5)


AVERAGES: dict[str, dict[str, Any]] = {
    "equal": {},
    "equal, with buffers": {"use_buffers": True},
    "moving": {"avg_fn": get_ema_avg_fn(0.9)},
    "moving, with buffers": {"avg_fn": get_ema_avg_fn(0.9), "use_buffers": True},
    "moving at once, with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@each_method
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_model(method: str, average: str, tmp_path: Path) -> None:
    """Those with buffers round these as integers: 2 * 0.9 + 2 * 0.1 becomes 1, and -1 becomes 0."""
    model = adapted(method, 1)
    averaged = AveragedModel(model, **AVERAGES[average])
    for seed in range(1, 5):
        randomize_adapter(model, seed=seed)
        averaged.update_parameters(model)
    module: Any = averaged.module
    assert torch.allclose(logits(module), with_parameters(method, own(module)), atol=1e-5)
    module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    assert torch.allclose(logits(loaded), logits(module), atol=1e-5)


@each_method
def test_teacher_of_self_distillation(method: str) -> None:
    """TRL's begins with zeros, of which it has 0.95 times and of the student 0.05 times after a step."""
    model = adapted(method, 0)
    arguments: Any = TrainingArguments("unused", report_to=[])
    callback = PEFTAdapterEMACallback(model, update_rate=0.05)
    callback.on_train_begin(arguments, SimpleNamespace(global_step=0), SimpleNamespace())  # type: ignore[arg-type]
    expected = {key: torch.zeros_like(value) for key, value in own(model).items()}
    for step in range(1, 4):
        randomize_adapter(model, seed=step)
        callback.on_step_end(arguments, SimpleNamespace(global_step=step), SimpleNamespace())  # type: ignore[arg-type]
        expected = mixed(expected, own(model), 0.95)
    model.set_adapter("teacher")
    assert torch.allclose(logits(model), with_parameters(method, expected), atol=1e-5)


@pytest.mark.parametrize("share", [0.995, 0.5])
def test_an_average_of_other_experts_is_refused(share: float, tmp_path: Path) -> None:
    first, second = (
        get_peft_model(tiny_model("olmoe"), SieveLoraConfig(r=2, selected_experts=mask)) for mask in (MASK, OTHER)
    )
    before = {key: value.clone() for key, value in first.state_dict().items()}
    state = mixed(get_peft_model_state_dict(first), get_peft_model_state_dict(second), share)
    first.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: set_peft_model_state_dict(first, state),
        lambda: first.load_adapter(tmp_path, "default"),
        lambda: first.load_state_dict(mixed(first.state_dict(), second.state_dict(), share)),
        lambda: first.load_state_dict({key: value + 1 for key, value in second.state_dict().items()}),
        lambda: PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path),
        lambda: tiny_model("olmoe").load_adapter(str(tmp_path)),
    ):
        with pytest.raises(SieveError, match=r"(?i)average|of the state dict is not"):
            load()
        assert all(torch.equal(value, before[key]) for key, value in first.state_dict().items())


def test_an_average_of_pruned_experts_is_refused() -> None:
    """That of [1, 3] and [3, 5] has the ids [2, 4]."""

    def pruned(experts: list[int]) -> PeftModel:
        settings: dict[str, Any] = {"num_experts": 6, "r": 2, "target_modules": ["q_proj"]}
        kept = {f"model.layers.{i}.self_attn.q_proj": experts for i in range(2)}
        return get_peft_model(tiny_model("olmoe"), LoraMoeConfig(**settings, kept_experts=kept))

    state = mixed(*(get_peft_model_state_dict(pruned(experts)) for experts in ([1, 3], [3, 5])), 0.5)  # type: ignore
    for experts in ([1, 3], [0, 5]):
        with pytest.raises(SieveError, match=r"experts \[2.0, 4.0\]"):
            set_peft_model_state_dict(pruned(experts), copy.copy(state))


def test_zeros_for_factors_that_are_not_are_refused() -> None:
    model = adapted("sieve", 1)
    state = {key: v if v.is_floating_point() else 0 * v for key, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(SieveError):
        set_peft_model_state_dict(model, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_dict_in_half_precision_is_loaded(dtype: torch.dtype) -> None:
    """Which has no number between 256 and 258 (bfloat16), or 2048 and 2050."""
    base = tiny_model("olmoe", num_experts=512, num_hidden_layers=1, intermediate_size=4)
    ids = [*range(0, 200), *range(210, 512)]
    model = get_peft_model(base, SieveLoraConfig(r=1, selected_experts={FIRST: ids}, train_attention=False))
    randomize_adapters(model)
    state = {key: value.to(dtype) for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    slots = get_peft_model_state_dict(model)[f"base_model.model.{FIRST}.lora_experts.slots"]
    assert torch.equal(slots, slots_of(512, ids)) and slots.dtype == torch.int32


def test_no_average_of_different_maps_is_a_map() -> None:
    for size, number in ((2, 1), (3, 2), (5, 2)):  # the second has the sum zero
        maps = [slots_of(size, ids) for ids in itertools.combinations(range(size), number)]
        for first, second in itertools.permutations(maps, 2):
            for share in (0.25, 0.5, 0.995):
                average = share * first + (1 - share) * second
                assert not any(scale_of(average, one) for one in maps)
                assert not any(scale_of(average.to(torch.int32), one) for one in maps)


def test_long_averages_of_one_map_are_that_map() -> None:
    expected = slots_of(128, range(3, 100))
    for decay, dtype in itertools.product((0.9, 0.995, 0.9999), (torch.float32, torch.bfloat16)):
        average = expected.to(dtype)
        for _ in range(500):
            average = decay * average + (1 - decay) * expected.to(dtype)
        assert scale_of(average, expected) == 1
    assert scale_of(3 * expected, expected) == 3
    assert scale_of(expected.clamp(max=95), expected) is None


def test_the_file_keeps_its_form(tmp_path: Path) -> None:
    adapted("sieve", 1).save_pretrained(tmp_path)
    slots = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{FIRST}.lora_experts.slots"]
    assert slots.tolist() == [-1, 0, 1, -1, -1, 2, -1, -1] and slots.dtype == torch.int32
