"""What a method gets by registering, and by nothing else: shown with one that only these tests know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import SieveError
from tests.hf.toy_method import ToyConfig, ToyLayer
from tests.models import tiny_model, token_batch

TARGETS = ["q_proj", "v_proj"]


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("olmoe"), ToyConfig(target_modules=TARGETS, **settings)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(model)).logits


def state(model: nn.Module) -> dict[str, Any]:
    """What a model consists of, names, classes and hooks included."""
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {"classes": {path: type(m) for path, m in model.named_modules()}, "hooks": hooks, "trainable": trainable}


def test_it_is_saved_and_loaded_in_peft_and_in_transformers(tmp_path: Path) -> None:
    model = adapted(factor=0.5)
    model.save_pretrained(tmp_path)
    assert not torch.equal(logits(model), logits(tiny_model("olmoe")))
    assert type(PeftConfig.from_pretrained(tmp_path)) is ToyConfig
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)), logits(model))
    in_transformers = tiny_model("olmoe")
    in_transformers.load_adapter(str(tmp_path))
    assert torch.equal(logits(in_transformers), logits(model))


def without(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def foreign(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key.replace("q_proj", "k_proj")] = tensors[key].clone()


def narrower(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][:3].clone()


@pytest.mark.parametrize("change", [without, foreign, narrower])
@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_weights_that_do_not_fit_are_refused_and_leave_no_trace(change: Any, loader: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors, next(key for key in tensors if "layers.1.self_attn.q_proj" in key))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base = tiny_model("olmoe")
    before, expected = state(base), logits(base)
    with pytest.raises(SieveError, match=r"_proj|other shapes"):
        if loader == "peft":
            PeftModel.from_pretrained(base, tmp_path)
        else:
            base.load_adapter(str(tmp_path))
    assert state(base) == before and torch.equal(logits(base), expected)
    assert not getattr(base, "peft_config", {}) and not base._hf_peft_config_loaded


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text()[:-20])
    with pytest.raises(SieveError, match="cannot be read as JSON"):
        PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)


def test_it_has_a_model_card(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"toy", "peft_sieve"} <= set(card.data.tags)
    assert "# Toy adapters for" in card.text and "import peft_sieve" in card.text


def test_pickled_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SieveError, match="safe_serialization=False"):
        adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not any(tmp_path.iterdir())


def test_a_second_injection_is_refused() -> None:
    base = tiny_model("olmoe")
    model = get_peft_model(base, ToyConfig(target_modules=TARGETS))
    before, expected, config = state(base), logits(model), model.peft_config["default"]
    with pytest.raises(SieveError, match="already has an adapter named 'default'"):
        get_peft_model(base, ToyConfig(target_modules=["k_proj"], factor=3.0))
    assert state(base) == before and torch.equal(logits(model), expected) and model.peft_config["default"] is config


@pytest.mark.parametrize("name", ["q_proj", "toy_linear", "base_layer"])
def test_names_that_saving_would_mistake_are_refused(name: str) -> None:
    model = adapted()
    before = state(model)
    with pytest.raises(SieveError, match=f"named '{name}'"):
        model.add_adapter(name, ToyConfig(target_modules=TARGETS))
    assert state(model) == before and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "transformers"])
def test_an_injection_is_taken_back_after_an_error(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = adapted() if way == "add_adapter" else tiny_model("olmoe")
    before, expected = state(base), logits(base)
    updated: list[str] = []

    def fails_late(self: ToyLayer, adapter_name: str, config: ToyConfig) -> None:
        original(self, adapter_name, config)
        updated.append(adapter_name)
        if len(updated) == 3:
            raise RuntimeError("the third layer cannot")

    original = ToyLayer.update_layer
    monkeypatch.setattr(ToyLayer, "update_layer", fails_late)
    config = ToyConfig(target_modules=["q_proj", "k_proj"])
    with pytest.raises(RuntimeError, match="the third layer cannot"):
        if way == "get_peft_model":
            get_peft_model(base, config)
        else:
            base.add_adapter(*(("second", config) if way == "add_adapter" else (config, "second")))
    monkeypatch.undo()
    assert state(base) == before and torch.equal(logits(base), expected)
    if way == "add_adapter":
        assert list(base.peft_config) == ["default"]
        base.add_adapter("second", config)
    else:
        assert torch.equal(logits(get_peft_model(base, ToyConfig(target_modules=TARGETS, factor=0.0))), expected)


def test_what_it_does_not_say_it_can_is_refused() -> None:
    with pytest.raises(SieveError, match="ToyLayer cannot be merged"):
        adapted().merge_adapter()


def test_the_saved_configuration_is_the_same_file_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        adapted().save_pretrained(tmp_path / name)
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1] and json.loads(texts[0])["factor"] == 1.0
