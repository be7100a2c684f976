"""The life of adapters whose experts share factors: saved, loaded, merged, beside others, in batches of several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.experts.layer import expert_layers
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.module_models import jetmoe
from tests.reference import assert_same
from tests.tuners.test_lifecycle import assert_close, assert_no_trace, assert_same_weights, base_weights

MODELS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: tiny_model("olmoe"),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
    "module list": deepseek_like,
    "pairs of stacks": jetmoe,
}
# Without experts of their own in a layer, or in any; with nothing but those; on some projections, of other ranks.
OPTIONS: dict[str, dict[str, Any]] = {
    "both": {"cold_experts": "shared", "share_outer": True},
    "cold": {"cold_experts": "shared"},
    "outer": {"share_outer": True},
    "everything shared": {"cold_experts": "shared", "share_outer": True, "ids": []},
    "no cold ones": {"cold_experts": "shared", "ids": range(8)},
    "rslora": {"cold_experts": "shared", "share_outer": True, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "one projection": {"cold_experts": "shared", "share_outer": True, "expert_projections": ["up_proj"]},
}
each_model = pytest.mark.parametrize("name", MODELS)


def config(base: nn.Module, ids: Any = (1, 4, 6), **settings: Any) -> SieveLoraConfig:
    mask = {layer.path: list(ids) for layer in find_moe_layers(base)}
    return SieveLoraConfig(**{"r": 4, "selected_experts": mask, "task_type": "CAUSAL_LM", **settings})


def adapted(base: nn.Module, seed: int = 1, **settings: Any) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), config(base, **settings))
    randomize_adapters(model, seed=seed)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    return model.eval()(**token_batch(model), **options).logits


LOADERS: dict[str, Callable[[nn.Module, Path, SieveLoraConfig], nn.Module]] = {
    "PeftModel": lambda base, path, made: PeftModel.from_pretrained(base, path),
    "empty first": lambda base, path, made: PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True),
}


def resumed(base: nn.Module, path: Path, made: SieveLoraConfig) -> nn.Module:
    """As a trainer does, into the adapter that is there."""
    model = get_peft_model(base, made)
    model.load_adapter(str(path), "default", is_trainable=True)
    return model


def by_transformers(base: Any, path: Path, made: SieveLoraConfig) -> nn.Module:
    base.load_adapter(str(path))
    return base


LOADERS |= {"resumed": resumed, "transformers": by_transformers}


@pytest.mark.parametrize(
    ("name", "option"), {**{("olmoe", option): 0 for option in OPTIONS}, **{(name, "both"): 0 for name in MODELS}}
)
def test_saved_loaded_merged_and_taken_out(name: str, option: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    plain = logits(base)
    model = adapted(base, **OPTIONS[option])
    expected, before = logits(model), base_weights(model)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path)
    for load in LOADERS.values():
        loaded = load(copy.deepcopy(base), tmp_path, config(base, **OPTIONS[option]))
        assert torch.equal(logits(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    other = copy.deepcopy(model)
    for _ in range(2):
        model.merge_adapter()
        assert_close(logits(model), expected)
        model.unmerge_adapter()
        assert_same_weights(base_weights(model), before)
        assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert_close(logits(model.merge_and_unload()), expected)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(other.unload()), plain)


# Of adapters in one layer; each has experts of its own that are cold for others.
TOGETHER: dict[str, dict[str, Any]] = {
    "plain": {"ids": [1, 4]},
    "cold": {"ids": [0, 4], "cold_experts": "shared", "r": 2},
    "outer": {"ids": [2, 3, 4], "share_outer": True, "expert_projections": ["up_proj"]},
    "both": {"ids": [], "cold_experts": "shared", "share_outer": True, "r": 3},
}
ONLY_EXPERTS = {"train_attention": False, "train_router": False, "train_shared_experts": False}


def together(base: nn.Module, **common: Any) -> PeftModel:
    first, *others = TOGETHER
    model = get_peft_model(copy.deepcopy(base), config(base, **TOGETHER[first], **common), first)
    for adapter in others:
        model.add_adapter(adapter, config(base, **TOGETHER[adapter], **common))
    randomize_adapters(model, std=0.05)
    return model.eval()


def add_to(base: nn.Module, model: nn.Module, adapter: str, factor: float = 1.0) -> None:
    """Add what an adapter adds to the experts of a plain model."""
    layers = {layer.path: layer for layer in find_moe_layers(base)}
    for path, layer in expert_layers(model):
        plan = layer.plans[adapter]
        for projection in plan.ranks:
            for expert in (*plan.experts, *plan.cold):
                weight = layers[path].family.expert_weight(layers[path].experts, projection, expert)
                if path.endswith("input_linear"):
                    block = base.get_submodule(path.rpartition(".")[0])
                    weight = layers[path].family.expert_weight(block, projection, expert)
                weight += factor * layer.get_delta_weight(adapter, projection, expert)


@each_model
def test_adapters_of_other_settings_in_one_layer(name: str) -> None:
    """Alone, and all at once, each is what it adds to the weights."""
    base = MODELS[name]().double()
    base.config._experts_implementation = "eager"  # which takes float64
    model = together(base, **ONLY_EXPERTS)
    everything, alone = copy.deepcopy(base), {}
    for adapter in TOGETHER:
        model.set_adapter(adapter)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in model.named_parameters() if "lora_" in n and f".{adapter}." in n}
        one = copy.deepcopy(base)
        for target in (one, everything):
            add_to(target, model, adapter)
        alone[adapter] = logits(model)
        assert_same(alone[adapter], logits(one), adapter, rtol=1e-7, atol=1e-9)
    model.base_model.set_adapter(list(TOGETHER))
    assert_same(logits(model), logits(everything), "all", rtol=1e-7, atol=1e-9)
    for adapter in ("both", "plain"):
        model.delete_adapter(adapter)
        assert_no_trace(model, adapter)
    model.set_adapter("cold")
    assert torch.equal(logits(model), alone["cold"])


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
@torch.no_grad()
def test_a_batch_of_several_adapters(name: str) -> None:
    base = MODELS[name]()
    model = together(base)
    names = [*TOGETHER, "__base__", "both"]
    batch = token_batch(base, batch=len(names))
    mixed = model(**batch, adapter_names=names).logits
    for index, adapter in enumerate(names):
        row = {key: value[index : index + 1] for key, value in batch.items()}
        if adapter in TOGETHER:
            model.set_adapter(adapter)
        expected = (base if adapter == "__base__" else model)(**row).logits
        assert_same(mixed[index : index + 1], expected, f"row {index}", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    """The forward drops again what it dropped."""
    model = adapted(MODELS[name](), **OPTIONS["both"], lora_dropout=0.3).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        batch = token_batch(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n})
        model.zero_grad()
    for parameter_name, gradient in found[0].items():
        assert gradient.any(), parameter_name
        assert_same(found[1][parameter_name], gradient, parameter_name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_half_precision(autocast: bool, tmp_path: Path) -> None:
    base = tiny_model("olmoe", dtype=torch.bfloat16)
    made = config(base, **OPTIONS["both"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), made, autocast_adapter_dtype=autocast).eval()
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}
    batch = token_batch(base)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    assert all(g.dtype == dtype and g.isfinite().all() and g.any() for g in gradients.values())
    assert gradients["base_model.model.model.layers.0.mlp.experts.lora_gate_up_A.default.weight"].shape[0] == 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(logits(loaded), logits(model))
