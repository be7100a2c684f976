"""The life of adapters whose experts share factors: saved, loaded, merged, beside others, in batches of several."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
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
    "hellori": {"ids": [3], "cold_experts": "shared", "hellori_density": 0.5},
    "full": {"ids": [0, 5], "expert_tuning": "full"},
}
ONLY_EXPERTS = {"train_attention": False, "train_router": False, "train_shared_experts": False}


def together(base: nn.Module, **common: Any) -> PeftModel:
    first, *others = TOGETHER
    model = get_peft_model(copy.deepcopy(base), config(base, **TOGETHER[first], **common), first)
    for adapter in others:
        model.add_adapter(adapter, config(base, **TOGETHER[adapter], **common))
    randomize_adapters(model, std=0.05)
    for module in model.modules():
        if getattr(module, "kept", None) is not None:
            module.weight.data.mul_(module.kept)
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
        own = {n for n, _ in model.named_parameters() if "lora_" in n and f".{adapter}." in n}
        assert trainable == {n for n in own if adapter != "hellori" or "_B." in n}
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


# Masks


def skipped(model: nn.Module, layer: int) -> nn.Module:
    """A model of whose layers one is passed by, so that calibration sends no token there."""
    model.model.layers[layer].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


@pytest.mark.filterwarnings("ignore:No token reached")
@pytest.mark.parametrize("calibration", [{}, {"strategy": "greedy"}, {"calib_stability": 0.1}])
def test_a_layer_without_selected_experts_after_calibration(calibration: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_model("olmoe")
    first, second = (layer.path for layer in find_moe_layers(base))
    data = [token_batch(base, seed=seed) for seed in range(2)]
    settings = {**OPTIONS["both"], **calibration, "calib_dataset": data, "r": 4}
    model = get_peft_model(skipped(copy.deepcopy(base), 1), SieveLoraConfig(**settings))
    made = model.peft_config["default"]
    assert len(made.selected_experts[first]) == 2 and made.selected_experts[second] == []
    layer = dict(expert_layers(model))[second]
    assert layer.plans["default"].cold == tuple(range(8))
    randomize_adapters(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["selected_experts"] == made.selected_experts
    del model.base_model.model.model.layers[1].forward
    expected = logits(model)
    for load in ("PeftModel", "transformers"):
        loaded = LOADERS[load](copy.deepcopy(base), tmp_path, made)
        assert torch.equal(logits(loaded), expected)
        assert all(parameter.numel() for name, parameter in loaded.named_parameters())
    frozen = SieveLoraConfig(**{**settings, "cold_experts": "frozen"})
    assert list(get_peft_model(skipped(copy.deepcopy(base), 1), frozen).peft_config["default"].selected_experts) == [
        first
    ]


def test_an_empty_mask_without_shared_experts_is_refused() -> None:
    mask = {"model.layers.0.mlp.experts": []}
    with pytest.raises(SieveError, match="does not name a single expert"):
        SieveLoraConfig(selected_experts=mask)
    for empty in ({}, None):
        shared = {"cold_experts": "shared", "selected_experts": empty}
        with pytest.raises(SieveError, match="does not name a single expert|neither calib_dataset nor"):
            get_peft_model(tiny_model("olmoe"), SieveLoraConfig(**shared))
    model = get_peft_model(tiny_model("olmoe"), SieveLoraConfig(cold_experts="shared", selected_experts=mask))
    assert [path for path, _ in expert_layers(model)] == ["model.layers.0.mlp.experts"]


def test_settings_that_leave_a_layer_out_leave_what_its_experts_share_out() -> None:
    base = tiny_model("olmoe")
    model = get_peft_model(base, config(base, ids=[], cold_experts="shared", layers_to_transform=[1]))
    assert [path for path, _ in expert_layers(model)] == ["model.layers.1.mlp.experts"]
    assert list(model.peft_config["default"].selected_experts) == ["model.layers.1.mlp.experts"]


# What PEFT's tools say of it


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_initialisations(init: bool | str) -> None:
    """No adapter is without effect or of another spread for being shared."""
    base = tiny_model("qwen3_moe", hidden_size=64)
    model = get_peft_model(base, config(base, r=8, init_lora_weights=init, **OPTIONS["both"])).eval()
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(model), plain) == bool(init)
    for _, layer in expert_layers(model):
        for projection, (width, _) in layer.shape.projections.items():
            a, b, _ = layer.factors("default", projection)
            for factor, wanted in (
                (a, 1 / 8 if init == "gaussian" else width**-0.5 / 3**0.5),
                (b, 0 if init else 24**-0.5),
            ):
                for slot in factor:
                    assert slot.std().item() == pytest.approx(wanted, rel=0.25), projection


@each_model
def test_scales_parameters_and_groups_of_optimizers(name: str) -> None:
    base = MODELS[name]().double()
    base.config._experts_implementation = "eager"
    settings = {"selected_experts": {layer.path: [1, 4] for layer in find_moe_layers(base)}, "r": 3}
    model = adapted(base, **ONLY_EXPERTS, **OPTIONS["both"], **settings)
    count = 0
    for layer in find_moe_layers(base):
        for projection, (width_in, width_out) in layer.shape.projections.items():
            outer, inner = (width_out, width_in) if projection == "down_proj" else (width_in, width_out)
            count += 3 * (outer + 3 * inner)  # one for all, and one for each of the two experts and for the rest
    assert model.get_nb_trainable_parameters()[0] == count
    groups = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, side in zip(groups, "ABBB", strict=True):
        assert all(f"_{side}.default" in names[id(parameter)] for parameter in group["params"])
    assert sum(len(group["params"]) for group in groups) == 4 * len(find_moe_layers(base))
    halved = copy.deepcopy(base)
    add_to(halved, model, "default", 0.5)
    expected = logits(model)
    with rescale_adapter_scale(model, 0.5):
        assert_same(logits(model), logits(halved), "halved", rtol=1e-7, atol=1e-9)
    for _, layer in expert_layers(model):
        layer.scale_layer(0.5)
    assert_same(logits(model), logits(halved), "scaled", rtol=1e-7, atol=1e-9)
    for _, layer in expert_layers(model):
        layer.unscale_layer()
    assert torch.equal(logits(model), expected)
