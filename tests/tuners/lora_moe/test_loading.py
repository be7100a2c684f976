"""Weights that are refused leave a model as it was, whoever loads them; and what the model card of those saved says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import SieveError
from tests.models import tiny_model
from tests.tuners.lora_moe.models import adapted, dense_model, layers_of, optimizer_of, padded_batch

WEIGHTS = "adapter_model.safetensors"
FIRST = "model.layers.0.self_attn.q_proj"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def without_a_tensor(weights: dict[str, torch.Tensor]) -> None:
    del weights[f"base_model.model.{FIRST}.lora_router.weight"]


def of_other_experts(weights: dict[str, torch.Tensor]) -> None:
    key = f"base_model.model.{FIRST}.lora_usage.experts"
    weights[key] = (weights[key] + 1) % 4


def load_in_peft(base: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(base, folder)


def load_in_transformers(base: nn.Module, folder: Path) -> None:
    base.load_adapter(str(folder))


LOADERS = pytest.mark.parametrize("load", [load_in_peft, load_in_transformers])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**padded_batch(model)).logits


def state(model: nn.Module) -> Any:
    return [
        [(name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        list(getattr(model, "peft_config", {})),
        getattr(model, "_hf_peft_config_loaded", None),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@LOADERS
@pytest.mark.parametrize("change", [without_a_tensor, of_other_experts])
@pytest.mark.parametrize("name", ["dense", "qwen2_moe"])
def test_a_base_model_is_left_as_it_was_when_weights_are_refused(
    load: Callable[..., None], change: Callable[..., None], name: str, tmp_path: Path
) -> None:
    adapted(name).save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    base = dense_model() if name == "dense" else tiny_model(name)
    before, expected = state(base), logits(base)
    with pytest.raises(SieveError, match="adapter 'default'"):
        load(base, tmp_path)
    assert same(state(base), before)
    assert logits(base).equal(expected)
    assert logits(adapted(base)).equal(logits(adapted(name)))


def test_other_adapters_stay_when_weights_are_refused(tmp_path: Path) -> None:
    adapted(num_experts=3).save_pretrained(tmp_path)
    change_weights(tmp_path, without_a_tensor)
    model = adapted().train()
    before = state(model)
    with pytest.raises(SieveError, match=f"no {FIRST}.lora_router.weight for adapter 'other'"):
        model.load_adapter(str(tmp_path), "other")
    assert same(state(model), before)
    assert set(model.peft_config) == {"default"}
    # The forwards are still watched.
    model.train()(**padded_batch(model))
    assert float(model.auxiliary_loss()) > 0


def test_transformers_keeps_the_adapter_that_was_there(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "good")
    adapted(num_experts=3).save_pretrained(tmp_path / "bad")
    change_weights(tmp_path / "bad", of_other_experts)
    base = dense_model()
    base.load_adapter(str(tmp_path / "good"), "good")
    before, expected = state(base), logits(base)
    with pytest.raises(SieveError, match=r"belong to unpruned experts \[1, 2, 3\], and adapter 'bad' has .* \[0, 1, 2"):
        base.load_adapter(str(tmp_path / "bad"), "bad")
    assert same(state(base), before)
    assert logits(base).equal(expected)


def test_a_configuration_of_other_kept_experts_is_refused_by_transformers(tmp_path: Path) -> None:
    """PEFT takes the experts of the weights then; transformers assigns values to whatever is there."""
    pruned().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    size = len(config["kept_experts"][FIRST])
    other = [ids for ids in ([0, 1], [2, 3], [0, 1, 2], [1, 2, 3]) if len(ids) == size]
    config["kept_experts"][FIRST] = next(ids for ids in other if ids != config["kept_experts"][FIRST])
    file.write_text(json.dumps(config))
    base = dense_model()
    before = state(base)
    with pytest.raises(SieveError, match=f"{FIRST}.* pruned experts|pruned experts .*{FIRST}"):
        base.load_adapter(str(tmp_path))
    assert same(state(base), before)


def pruned() -> PeftModel:
    model = adapted(prune_step=1, prune_threshold=1.1).train()
    optimizer = optimizer_of(model)
    model(**padded_batch(model)).loss.backward()
    optimizer.step()
    assert model.update_and_prune(1, optimizer)
    optimizer.zero_grad()
    return model


def test_the_model_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    model = pruned()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import peft_sieve") == 1 and "arXiv 2604.26340" in card.text
    assert card.text.lstrip().startswith("# LoRA experts for")
    assert "lora-moe" in card.data["tags"] and "mixture-of-experts" not in card.data["tags"]
    left = sum(len(layer.plans["default"].experts) for layer in layers_of(model).values())
    assert f"pruning left {left} of {4 * len(layers_of(model))} in {len(layers_of(model))} layers" in card.text
    count = sum(p.numel() for n, p in model.named_parameters() if ".default." in n)
    assert f" {count:,} parameters" in card.text


def test_the_card_before_pruning_speaks_of_none(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "4 LoRA experts of rank 2" in text and "pruning" not in text


def test_the_comparison_can_fail() -> None:
    model = adapted()
    before, other = state(model), copy.deepcopy(model)
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad).add_(1)
    assert same(state(model), before) and not same(state(other), before)


@pytest.mark.parametrize("base", ["dense", "olmoe"])
def test_values_loaded_empty_first_keep_their_type(base: str, tmp_path: Path) -> None:
    """PEFT moves them to their layer's device afterwards, and would round them to its type."""

    def fresh() -> nn.Module:
        return dense_model(torch.bfloat16) if base == "dense" else tiny_model(base, torch.bfloat16)

    model = adapted(fresh())
    model.save_pretrained(tmp_path)
    want = load_file(tmp_path / WEIGHTS)
    assert any(not torch.equal(value, value.bfloat16()) for value in want.values() if value.is_floating_point())
    loaded = PeftModel.from_pretrained(fresh(), tmp_path, low_cpu_mem_usage=True)
    found = get_peft_model_state_dict(loaded)
    assert want.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in want.items())
    small = get_peft_model(fresh(), model.peft_config["default"], autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())
