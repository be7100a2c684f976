"""Weights whose keys are not those that `save_pretrained` gives: they are loaded whole, or refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from peft_sieve import SieveError
from peft_sieve.adapters.reading import open_adapter
from tests.models import randomize_adapter, tiny_model, token_batch
from tests.tuners.errors import assert_plain
from tests.tuners.test_injection import CONFIGS

PREFIX, WEIGHTS = "base_model.model.", "adapter_model.safetensors"
METHODS = ["sieve", "epng", "perft_r", "perft_e", "lora_moe"]
Saved = tuple[PreTrainedModel, Path, torch.Tensor]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


@pytest.fixture(scope="module", params=METHODS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A base model, an adapter of it in a folder, and the outputs of both together."""
    folder, base = tmp_path_factory.mktemp(request.param), tiny_model("olmoe")
    model = get_peft_model(copy.deepcopy(base), CONFIGS[request.param]())
    randomize_adapter(model)
    model.save_pretrained(folder)
    return base, folder, logits(model)


def by_peft(base: Any, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


def into_an_adapter(base: Any, folder: Path) -> nn.Module:
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    model.load_adapter(folder, "default")
    return model


def by_state_dict(base: Any, folder: Path) -> nn.Module:
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    return model


def by_state_dict_into_the_base(base: Any, folder: Path) -> nn.Module:
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), base)
    set_peft_model_state_dict(base, load_file(folder / WEIGHTS))
    return base


def by_transformers(base: Any, folder: Path) -> nn.Module:
    base.load_adapter(str(folder))
    return base


def by_transformers_from_memory(base: Any, folder: Path) -> nn.Module:
    config = PeftConfig.from_pretrained(folder)
    base.load_adapter(peft_config=config, adapter_state_dict=load_file(folder / WEIGHTS))
    return base


PEFT_WAYS = [by_peft, into_an_adapter, by_state_dict, by_state_dict_into_the_base]
WAYS = [*PEFT_WAYS, by_transformers, by_transformers_from_memory]


def renamed(saved: Saved, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of the adapter with other keys, without those that get none."""
    shutil.copytree(saved[1], target, dirs_exist_ok=True)
    tensors = {rename(key): value for key, value in load_file(target / WEIGHTS).items()}
    save_file({key: value for key, value in tensors.items() if key}, target / WEIGHTS, metadata={"format": "pt"})
    return target


def with_name(key: str) -> str:
    start, _, end = key.rpartition(".")
    return f"{start}.default.{end}"


@pytest.mark.parametrize("way", WAYS)
def test_without_the_prefix(way: Callable[..., nn.Module], saved: Saved, tmp_path: Path) -> None:
    """As PEFT and transformers load plain LoRA."""
    folder = renamed(saved, tmp_path, lambda key: key.removeprefix(PREFIX))
    assert torch.equal(logits(way(copy.deepcopy(saved[0]), folder)), saved[2])


@pytest.mark.parametrize("way", PEFT_WAYS)
def test_some_keys_without_the_prefix_or_with_the_name(
    way: Callable[..., nn.Module], saved: Saved, tmp_path: Path
) -> None:
    folder = renamed(saved, tmp_path, lambda key: with_name(key) if "layers.0" in key else key.removeprefix(PREFIX))
    assert torch.equal(logits(way(copy.deepcopy(saved[0]), folder)), saved[2])


@pytest.mark.parametrize("saved", ["sieve", "epng"], indirect=True)
def test_readers_of_files_take_them_too(saved: Saved, tmp_path: Path) -> None:
    folder = renamed(saved, tmp_path, lambda key: with_name(key).removeprefix(PREFIX))
    opened = open_adapter(folder, saved[0])
    values = load_file(saved[1] / WEIGHTS)
    for path, layer in opened.expert_layers().items():
        assert torch.equal(layer.lora_down_A["default"].weight, values[f"{PREFIX}{path}.lora_down_A.weight"])


@pytest.mark.parametrize("way", PEFT_WAYS)
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: "module." + key,
        lambda key: "_orig_mod." + key,
        lambda key: PREFIX + key,
        lambda key: PREFIX + "model." + key.removeprefix(PREFIX),
        lambda key: key if "lora_A" in key or "perft_A" in key else None,
        lambda key: None,
    ],
    ids=["module", "compiled", "prefix twice", "model twice", "part", "none"],
)
def test_other_names_are_refused(
    rename: Callable[[str], str | None], way: Callable[..., nn.Module], saved: Saved, tmp_path: Path
) -> None:
    """Where PEFT would load nothing, or a part, and warn."""
    with pytest.raises(SieveError) as refusal:
        way(copy.deepcopy(saved[0]), renamed(saved, tmp_path, rename))
    assert_plain(str(refusal.value))


@pytest.mark.parametrize("saved", ["sieve"], indirect=True)
def test_a_tensor_under_two_names_is_refused(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved[1] / WEIGHTS)
    key = next(key for key in tensors if "lora_down_A" in key)
    model = get_peft_model(copy.deepcopy(saved[0]), PeftConfig.from_pretrained(saved[1]))
    with pytest.raises(SieveError, match=r"lora_down_A.weight twice"):
        set_peft_model_state_dict(model, {**tensors, key.removeprefix(PREFIX): tensors[key] + 1})


MISSING: list[Any] = [
    (settings, part, way)
    for settings, part, ways in (
        ({"modules_to_save": ["lm_head"]}, "lm_head", [by_peft, into_an_adapter, by_transformers]),
        ({"trainable_token_indices": [5]}, "trainable_tokens_delta", [by_peft, into_an_adapter, by_transformers]),
        # transformers does not say which biases are missing.
        ({"bias": "all"}, "k_proj.base_layer.bias", [by_peft, into_an_adapter]),
    )
    for way in ways
]


@pytest.mark.parametrize(("settings", "part", "way"), MISSING)
def test_what_is_trained_beside_factors_has_to_be_there(
    settings: dict[str, Any], part: str, way: Callable[..., nn.Module], tmp_path: Path
) -> None:
    base = tiny_model("olmoe", attention_bias="bias" in settings)
    get_peft_model(copy.deepcopy(base), CONFIGS["sieve"](**settings)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {key: value for key, value in tensors.items() if part not in key}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match=part) as refusal:
        way(base, tmp_path)
    assert_plain(str(refusal.value))
    if way is not into_an_adapter:
        assert [name for name, _ in base.named_modules()] == before
