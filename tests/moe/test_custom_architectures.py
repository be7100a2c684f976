"""docs/custom-architectures.md runs as it stands, and what it promises holds; registrations that cannot work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import (
    ModuleExperts,
    SieveError,
    SieveExpertLayer,
    SieveLoraConfig,
    profile_routing,
    register_moe_family,
)
from peft_sieve.moe.families import registry as families
from tests.models import randomize_adapters
from tests.reference import assert_same
from tests.transformers4_like import transformers4_like

PAGE = Path(__file__).parents[2] / "docs" / "custom-architectures.md"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names that the page's code defines. Its families are gone again afterwards."""
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    names: dict[str, Any] = {"__name__": "page"}
    torch.manual_seed(0)
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)), names)
    return names


def test_the_page(page: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    mask = page["model"].peft_config["default"].selected_experts
    assert list(mask) == ["layers.0.pool", "layers.1.experts"]
    assert all(len(ids) == 2 for ids in mask.values())


def test_counts_and_mass(page: dict[str, Any]) -> None:
    model, batch = page["Model"](), page["batches"][0]
    profile = profile_routing(model, [batch])
    x = model.embed(batch["input_ids"]).flatten(0, 1)
    for index, path, score in ((0, "layers.0.pool", torch.sigmoid), (1, "layers.1.experts", lambda t: t.softmax(-1))):
        block = model.layers[index]
        weights, chosen = score((block.scorer if index == 0 else block.router)(x)).topk(2)
        assert torch.equal(profile.counts[path], chosen.flatten().bincount(minlength=8))
        mass = torch.zeros(8).index_add_(0, chosen.flatten(), weights.detach().flatten())
        assert torch.allclose(profile.mass[path], mass.double(), rtol=1e-4)
        x = block(x)


def test_the_whole_path(page: dict[str, Any], tmp_path: Path) -> None:
    """Gradients against explicit weights, save, load, merge, unmerge."""
    torch.manual_seed(1)
    base, batch = page["Model"]().double(), page["batches"][0]
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    mask = {"layers.0.pool": [1, 4], "layers.1.experts": [0, 7]}
    config = SieveLoraConfig(r=4, lora_dropout=0.0, selected_experts=mask, train_router=False, target_modules=[])
    model = get_peft_model(base, config)
    randomize_adapters(model)
    model(**batch).square().sum().backward()
    trained = model(**batch).detach()

    merged = dict(weights)
    leaves: dict[str, torch.Tensor] = {}
    for layer in (module for module in model.modules() if isinstance(module, SieveExpertLayer)):
        for projection in ("up_proj", "down_proj"):
            a, b, scaling = layer.factors("default", projection)
            for slot, expert in enumerate(mask[layer.path]):
                delta = scaling * b[slot].T @ a[slot]
                if layer.path == "layers.0.pool":
                    key = f"layers.0.pool.{expert}.{'expand' if projection == 'up_proj' else 'contract'}.weight"
                    merged[key] = merged[key] + delta
                    continue
                key = "layers.1.experts." + ("w_in" if projection == "up_proj" else "w_out")
                stack = merged[key].clone()
                stack[expert] += delta.T
                merged[key] = stack
        leaves |= {f"{layer.path}.{n}": p for n, p in layer.named_parameters() if "lora_" in n}
    output = torch.func.functional_call(page["Model"]().double(), merged, (batch["input_ids"],))
    expected = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    assert_same(trained, output.detach(), "output")
    for (name, leaf), gradient in zip(leaves.items(), expected, strict=True):
        assert_same(leaf.grad, gradient, name)

    model.save_pretrained(tmp_path)
    fresh = page["Model"]().double()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(**batch), trained)
    loaded.merge_adapter()
    assert_same(loaded(**batch), trained, "merged")
    loaded.unmerge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.unload().state_dict().items())


@pytest.mark.parametrize("given", [ModuleExperts, "mixtral", None])
def test_what_is_no_family(given: Any) -> None:
    with pytest.raises(SieveError, match="register_moe_family .*MoEFamily"):
        register_moe_family(given)


@pytest.mark.parametrize("layer_class", [nn.Linear, "torch.nn:Linear", 3])
def test_what_is_no_adapter_layer(layer_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    family = ModuleExperts("mine", gate_proj="w1", up_proj="w3", down_proj="w2")
    family.layer_class = layer_class
    register_moe_family(family)
    model = transformers4_like("mixtral_v4")
    modules = list(model.modules())
    with pytest.raises(SieveError, match="family 'mine'.*layer_class"):
        get_peft_model(model, SieveLoraConfig(selected_experts={"model.layers.0.block_sparse_moe.experts": [1]}))
    assert list(model.modules()) == modules


def test_a_later_family_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    block = transformers4_like("mixtral_v4").model.layers[0].block_sparse_moe
    assert families.family_of(block.experts).name == "mixtral_mlps"
    register_moe_family(ModuleExperts("mine", gate_proj="w1", up_proj="w3", down_proj="w2"))
    assert families.family_of(block.experts).name == "mine"
