"""The whole path on several architectures: one code path for all that follow the common interface of transformers,
and a `ModuleList` of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import SieveLoraConfig, profile_routing
from peft_sieve.moe.topology import find_moe_layers
from tests.deepseek_like import deepseek_like
from tests.models import CONFIGS, randomize_adapters, tiny_model, token_batch

ARCHITECTURES = [*CONFIGS, "deepseek_like"]


def make_model(name: str, **options: Any) -> nn.Module:
    return deepseek_like(**options) if name == "deepseek_like" else tiny_model(name, **options)


def set_implementation(model: nn.Module, implementation: str) -> None:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = implementation


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def adapted(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> PeftModel:
    config = SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_adapter_changes_nothing_to_the_bit(name: str, implementation: str) -> None:
    model = make_model(name)
    set_implementation(model, implementation)
    batch = token_batch(model)
    before = logits(model, batch)
    assert torch.equal(logits(adapted(model, batch).eval(), batch), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_save_load_merge(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    batch = token_batch(model)
    before = logits(model, batch)
    peft_model = adapted(model, batch)
    config = peft_model.peft_config["default"]
    layers = find_moe_layers(model)
    assert {path: len(ids) for path, ids in config.selected_experts.items()} == {layer.path: 2 for layer in layers}

    peft_model.train()
    peft_model(**batch, labels=batch["input_ids"]).loss.backward()
    expert_gradients = 0
    for parameter_name, parameter in peft_model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in parameter_name), parameter_name
        # B starts at zero, so A has no gradient yet.
        if "lora_gate_up_B" in parameter_name or "lora_down_B" in parameter_name:
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).any(), parameter_name
            expert_gradients += 1
    assert expert_gradients == 2 * len(layers)

    randomize_adapters(peft_model)
    peft_model.eval()
    trained = logits(peft_model, batch)
    assert not torch.allclose(trained, before)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path)
    assert torch.equal(logits(loaded, batch), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, batch), before)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(model)
    # Random adapters of this size make large logits: compare with their scale.
    assert (logits(merged, batch) - trained).abs().max() < 1e-4 * trained.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_are_what_the_experts_received(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recount from outside: what each call of an experts module, or of each module in the list, was given."""
    model = make_model(name)
    layers = find_moe_layers(model)
    counts = {layer.path: torch.zeros(layer.num_experts, dtype=torch.int64) for layer in layers}
    mass = {layer.path: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers}
    batch = token_batch(model, batch=2, length=16)
    profile = profile_routing(model, [batch])

    for layer in layers:
        if name == "deepseek_like":
            for index, expert in enumerate(layer.experts):

                def listed(x: torch.Tensor, path: str = layer.path, i: int = index, f: Any = expert.forward) -> Any:
                    counts[path][i] += x.shape[0]
                    return f(x)

                expert.forward = listed
            continue

        def fused(
            x: Any, ids: torch.Tensor, weights: torch.Tensor, path: str = layer.path, f: Any = layer.experts.forward
        ):
            for token in range(ids.shape[0]):
                for pair in range(ids.shape[1]):
                    counts[path][ids[token, pair]] += 1
                    mass[path][ids[token, pair]] += weights[token, pair].double()
            return f(x, ids, weights)

        layer.experts.forward = fused
    logits(model, batch)
    for layer in layers:
        assert counts[layer.path].sum() > 0
        assert torch.equal(profile.counts[layer.path], counts[layer.path]), layer.path
        if name != "deepseek_like":
            assert torch.allclose(profile.mass[layer.path], mass[layer.path], rtol=1e-12), layer.path


def test_targets_of_an_architecture_with_everything() -> None:
    """Shared experts and attention get plain LoRA, the shared expert's gate and dense layers do not."""
    model = tiny_model("qwen2_moe")
    names = set(adapted(model, token_batch(model)).base_model.targeted_module_names)
    assert names == {
        f"model.layers.{i}.{part}"
        for i in range(2)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    model = tiny_model("deepseek_v3")  # its first layer is dense
    names = set(adapted(model, token_batch(model)).base_model.targeted_module_names)
    assert not any(".0.mlp." in name for name in names)
    assert sum(".0.self_attn." in name for name in names) == 5


@pytest.mark.parametrize(
    ("switch", "gone"),
    [("train_attention", "self_attn"), ("train_router", "mlp.gate."), ("train_shared_experts", "shared_expert.")],
)
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_like"])
def test_switches(name: str, switch: str, gone: str) -> None:
    gone = gone.replace("shared_expert.", "shared_experts.") if name == "deepseek_like" else gone
    model = make_model(name)
    batch = token_batch(model)
    on = {n for n, p in adapted(make_model(name), batch).named_parameters() if p.requires_grad}
    off = {n for n, p in adapted(model, batch, **{switch: False}).named_parameters() if p.requires_grad}
    assert off == {n for n in on if gone not in n}
    assert off < on


def test_only_experts() -> None:
    switches = dict.fromkeys(("train_attention", "train_router", "train_shared_experts"), False)
    model = tiny_model("qwen2_moe")
    names = [n for n, p in adapted(model, token_batch(model), **switches).named_parameters() if p.requires_grad]
    assert names
    assert all(".mlp.experts.lora_" in n for n in names)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_like"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["gate_proj", "q_proj"]])
def test_given_target_modules_replace_the_always_active_ones_and_never_reach_into_experts(
    name: str, targets: Any
) -> None:
    model = make_model(name)
    peft_model = adapted(model, token_batch(model), target_modules=targets, train_router=False)
    names = peft_model.base_model.targeted_module_names
    assert not any(".experts." in n for n in names if "shared_experts" not in n)
    if targets == ["q_proj", "v_proj"]:
        assert {n.rpartition(".")[2] for n in names} == {"q_proj", "v_proj"}
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert any(".experts.lora_gate_up_A." in n for n in trainable)


def test_layers_to_transform_and_exclude_modules_apply_to_experts() -> None:
    model = tiny_model("olmoe")
    config = adapted(model, token_batch(model), layers_to_transform=[1]).peft_config["default"]
    assert list(config.selected_experts) == ["model.layers.1.mlp.experts"]
    model = tiny_model("olmoe")
    config = adapted(model, token_batch(model), exclude_modules=r".*layers\.1\..*").peft_config["default"]
    assert list(config.selected_experts) == ["model.layers.0.mlp.experts"]
