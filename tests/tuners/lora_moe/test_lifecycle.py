"""Saving, loading, switching and taking out adapters with LoRA experts, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import LoraMoeConfig, SieveError
from tests.models import CONFIGS, randomize_adapters, tiny_model, token_batch
from tests.tuners.lora_moe.models import SMALL, adapted, dense_model, layers_of, optimizer_of, padded_batch


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**token_batch(model)).logits


def trained(base: nn.Module | str = "dense", pruned: bool = True, **settings: Any) -> PeftModel:
    """After one step, so that its counters are not zero either."""
    model = adapted(base, prune_step=1, prune_threshold=1.1, **settings).train()
    optimizer = optimizer_of(model)
    model(**padded_batch(model)).loss.backward()
    optimizer.step()
    if pruned:
        model.update_and_prune(1, optimizer)
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("base", ["dense", "olmoe", "qwen2_moe"])
def test_saved_and_loaded_to_the_bit(base: str, pruned: bool, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return dense_model() if base == "dense" else tiny_model(base)

    model = trained(fresh(), pruned)
    want = logits(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    counts = {path: len(layer.plans["default"].experts) for path, layer in layers_of(model).items()}
    kept = config["kept_experts"]
    assert kept is None if not pruned else {path: len(ids) for path, ids in kept.items()} == counts
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(fresh(), tmp_path, **options)
        assert logits(loaded).equal(want)
        usage = {p: layer.usage("default") for p, layer in layers_of(loaded).items()}
        assert all(usage[p].tokens.equal(m.usage("default").tokens) for p, m in layers_of(model).items())
        assert all(layer.plans["default"].pruned is pruned for layer in layers_of(loaded).values())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("default" not in key for key in saved)


def test_the_default_takes_attention_and_shared_experts_and_no_router() -> None:
    names = {path.split(".", 3)[3] for path in layers_of(adapted("qwen2_moe"))}
    attention = {f"self_attn.{n}_proj" for n in "qkvo"}
    assert names == attention | {f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")}
    assert {path.split(".", 3)[3] for path in layers_of(adapted("olmoe"))} == attention
    assert {path.split(".", 3)[3] for path in layers_of(adapted("dense"))} == attention | {
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    left = layers_of(adapted("dense", exclude_modules=["q_proj", "mlp.up_proj"]))
    assert len(left) == 10 and not any(path.endswith(("q_proj", "up_proj")) for path in left)


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name: str, tmp_path: Path) -> None:
    """With the default targets every factor and router learns; pruned, saved and loaded."""
    model = adapted(tiny_model(name), std=0.1, prune_step=1, prune_threshold=1.1).train()
    paths = layers_of(model)
    assert not [p for p in paths if p.endswith((".gate", ".router", "lm_head")) or ".experts." in p or "mixer.in" in p]
    optimizer = optimizer_of(model)
    model(**padded_batch(model)).loss.backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    optimizer.step()
    assert model.update_and_prune(1, optimizer)
    model.save_pretrained(tmp_path)
    assert logits(PeftModel.from_pretrained(tiny_model(name), tmp_path)).equal(logits(model))


def test_a_new_adapter_changes_nothing() -> None:
    base = dense_model()
    want = logits(base)
    model = get_peft_model(base, LoraMoeConfig(**SMALL))
    assert logits(model).equal(want)
    assert not logits(get_peft_model(dense_model(), LoraMoeConfig(**SMALL, init_lora_weights=False))).equal(want)


def test_several_adapters_of_different_kinds_of_experts(tmp_path: Path) -> None:
    first, second = trained(), adapted(r=3, num_experts=6, top_k=3, target_modules=["q_proj", "down_proj"])
    base = logits(dense_model())
    want = {"first": logits(first), "second": logits(second), None: base}
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(dense_model(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert logits(model).equal(want[name]), name
        with model.disable_adapter():
            assert logits(model).equal(base)
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(dense_model(), tmp_path / "both" / "second")
    assert logits(again).equal(want["second"])
    model.delete_adapter("first")
    assert model.active_adapters == ["second"] and logits(model).equal(want["second"])
    plain = model.unload()
    assert logits(plain).equal(base)
    assert not layers_of(plain) and not plain._forward_hooks and not plain._forward_pre_hooks
    assert not plain.model._forward_hooks


def test_two_active_adapters_add_up() -> None:
    model = adapted(target_modules=["model.layers.0.self_attn.q_proj"])
    model.add_adapter("other", LoraMoeConfig(**SMALL, target_modules=["model.layers.0.self_attn.q_proj"]))
    randomize_adapters(model, seed=5)
    (layer,) = layers_of(model).values()
    x = torch.randn(5, 32)
    alone = {}
    for name in ("default", "other"):
        layer.set_adapter(name)
        alone[name] = layer(x) - layer.get_base_layer()(x)
    layer.set_adapter(["default", "other"])
    assert torch.allclose(layer(x), layer.get_base_layer()(x) + alone["default"] + alone["other"], atol=1e-5)


def test_transformers_loads_it_by_itself(tmp_path: Path) -> None:
    model = trained("olmoe")
    want = logits(model)
    model.save_pretrained(tmp_path)
    plain = tiny_model("olmoe")
    plain.load_adapter(str(tmp_path))
    assert logits(plain).equal(want)


def test_over_quantised_layers(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        model = dense_model()
        for path, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                small = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                parent, _, name = path.rpartition(".")
                setattr(model.model.get_submodule(parent), name, small.to("cpu"))
        return model

    model = trained(fresh())
    assert len(layers_of(model)) == 14 and model.peft_config["default"].kept_experts is not None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True).train()
    batch = token_batch(model)  # with gradients: without, kernels for the CPU want layers in multiples of 64
    assert loaded(**batch).logits.equal(model(**batch).logits)


def test_modules_to_save(tmp_path: Path) -> None:
    model = trained(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    assert logits(PeftModel.from_pretrained(dense_model(), tmp_path)).equal(logits(model))


@pytest.mark.parametrize("to_pruned", [True, False])
def test_weights_decide_the_shapes_of_an_adapter_that_is_there(to_pruned: bool) -> None:
    """A checkpoint from before or after pruning, loaded into one at the other point, as Trainer does it."""
    source, target = trained(pruned=to_pruned), trained(pruned=not to_pruned)
    parameters = [id(p) for p in target.parameters()]
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert logits(target).equal(logits(source))
    assert target.peft_config["default"].kept_experts == source.peft_config["default"].kept_experts
    assert [id(p) for p in target.parameters()] == parameters
    for path, layer in layers_of(target).items():
        assert layer.plans["default"] == layers_of(source)[path].plans["default"]
        assert layer.lora_router["default"].out_features == len(layer.plans["default"].experts)


def test_tools_of_peft() -> None:
    model = trained()
    numbers = model.get_nb_trainable_parameters()[0]
    experts = sum(
        len(m.plans["default"].experts) * (2 * (m.in_features + m.out_features) + m.in_features)
        for m in layers_of(model).values()
    )
    assert numbers == experts
    model.print_trainable_parameters()
    status = model.get_layer_status()
    assert len(status) == 14 and all(s.requires_grad == {"default": True} for s in status)
    assert model.get_model_status().peft_types == {"default": "LORA_MOE"}
    shares = model.expert_utilization()
    assert all(abs(float(s.sum()) - 1) < 1e-9 and len(s) == 4 for s in shares.values())


def test_a_copy_counts_for_itself() -> None:
    model = adapted().train()
    batch = padded_batch(model)
    model(**batch)
    other = copy.deepcopy(model)
    other(**batch)
    (path, layer), twin = next(iter(layers_of(model).items())), layers_of(other)
    assert twin[path].usage("default").tokens.sum() == 2 * layer.usage("default").tokens.sum()
    assert other.auxiliary_loss().equal(model.auxiliary_loss())


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda m: m.merge_and_unload(), "LoRA experts .*merged"),
        (lambda m: m.merge_adapter(), "LoRA experts .*merged"),
        (lambda m: m(**token_batch(m), adapter_names=["default"] * 3), "adapter_names"),
        (lambda m: m.expert_utilization("other"), "no adapter 'other'"),
    ],
)
def test_refused(action: Any, text: str) -> None:
    model = trained().eval()
    want = logits(model)
    with pytest.raises(SieveError, match=text):
        action(model)
    assert logits(model).equal(want)


def test_hotswap_is_refused_by_peft(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA_MOE was passed"):
        hotswap_adapter(model, str(tmp_path), "default")


@pytest.mark.parametrize(
    ("base", "settings", "text"),
    [
        ("olmoe", {"target_modules": ["experts"]}, r"target_modules .*mlp.experts.*OlmoeExperts.*linear layers"),
        ("dense", {"target_modules": ["embed_tokens"]}, "target_modules .*embed_tokens.*Embedding.*linear layers"),
        ("dense", {"target_modules": ["nothing"]}, "target_modules=.*'nothing'.* no linear layer of Qwen3ForCausalLM"),
        ("dense", {"kept_experts": {"model.layers.9.mlp.up_proj": [0, 1]}}, "kept_experts .*model.layers.9"),
    ],
)
def test_targets_that_cannot_be_adapted(base: str, settings: dict[str, Any], text: str) -> None:
    model = dense_model() if base == "dense" else tiny_model(base)
    with pytest.raises(SieveError, match=text):
        get_peft_model(model, LoraMoeConfig(**SMALL, **settings))
    assert not layers_of(model) and not model._forward_hooks


@pytest.mark.parametrize(
    "bad",
    [
        {"num_experts": 1},
        {"num_experts": 2.0},
        {"top_k": 0},
        {"top_k": 9},
        {"r": True},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"balance_loss_coef": -0.1},
        {"balance_loss_coef": float("nan")},
        {"prune_threshold": 0},
        {"prune_step": 0},
        {"prune_ratio": 1.0},
        {"init_lora_weights": "gaussian"},
        {"kept_experts": {"a": [1]}},
        {"kept_experts": {"a": [1, 1]}},
        {"kept_experts": {"a": [1, 8]}},
        {"kept_experts": [1, 2]},
    ],
    ids=str,
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(SieveError, match=f"^{name} .*{re.escape(repr(value))}"):
        LoraMoeConfig(**bad)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: s.pop("base_model.model.model.layers.0.mlp.up_proj.lora_usage.experts"),
            "no model.layers.0.mlp.up_proj.lora_usage.experts",
        ),
        (lambda s: s.update({k: v[:-1] for k, v in s.items() if "lora_A" in k}), "lora_A.* shape"),
        (
            lambda s: s.update({k: v[:-1] for k, v in s.items() if k.endswith("usage.tokens")}),
            r"of 3 with|num_experts=4.*\(3,\)",
        ),
        (lambda s: s.update({k: v + 1 for k, v in s.items() if k.endswith("usage.experts")}), "some of 4"),
        (
            lambda s: s.update({"base_model.model.model.layers.7.mlp.up_proj.lora_usage.experts": torch.arange(2)}),
            r"\b1 .*adapter 'default'.*model.layers.7.mlp.up_proj",
        ),
    ],
)
def test_weights_that_do_not_belong(change: Any, text: str, tmp_path: Path) -> None:
    model = trained(pruned=False)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SieveError, match=text):
        PeftModel.from_pretrained(dense_model(), tmp_path)
    want = logits(model)
    with pytest.raises(SieveError, match=text):
        model.load_adapter(tmp_path, "default")
    assert logits(model).equal(want)


def test_a_weighted_sum_is_refused() -> None:
    with pytest.raises(SieveError, match="LoRA experts have no weighted sum.*set_adapter"):
        adapted().add_weighted_adapter(["default"], [1.0], "sum")


def test_a_mask_that_is_passed_by_position_tells_of_padding() -> None:
    counts = []
    for by_position in (False, True):
        model = adapted(task_type=None).train()
        batch = padded_batch(model)
        if by_position:
            model(batch["input_ids"], batch["attention_mask"])
        else:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        counts.append([layer.usage("default").tokens.tolist() for layer in layers_of(model).values()])
    assert counts[0] == counts[1]
    assert sum(counts[0][0]) == 2 * int(batch["attention_mask"].sum())  # top-2
