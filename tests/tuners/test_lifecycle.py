"""An adapter's life in a model: switched off, merged, taken out, beside others, deleted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.tuners.common.experts.layer import SieveExpertLayer
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.reference import assert_same

# Fused with a router parameter; interleaved, transposed and with biases; shared experts beside; a list of modules.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "olmoe": lambda **options: tiny_model("olmoe", **options),
    "gpt_oss": lambda **options: tiny_model("gpt_oss", **options),
    "deepseek_v3": lambda **options: tiny_model("deepseek_v3", **options),
    "module list": deepseek_like,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
each_model = pytest.mark.parametrize("name", MODELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@dataclass
class Subject:
    """A base model that stays as it is, the same with an adapter, and what both of them say."""

    base: nn.Module
    batch: dict[str, torch.Tensor]
    model: PeftModel

    def logits(self, model: nn.Module | None = None) -> torch.Tensor:
        with torch.no_grad():
            return (self.model if model is None else model).eval()(**self.batch).logits

    @property
    def plain(self) -> torch.Tensor:
        return self.logits(self.base)


def masks(base: nn.Module, ids: list[int], layers: int = 2) -> dict[str, list[int]]:
    """The same ids in the last layers."""
    paths = [path for path, _ in base.named_modules() if path.endswith(".mlp.experts")]
    return dict.fromkeys(paths[-layers:], ids)


def config(base: nn.Module, ids: list[int], **settings: Any) -> SieveLoraConfig:
    return SieveLoraConfig(
        **{"r": 4, "lora_alpha": 8, "selected_experts": masks(base, ids), "task_type": "CAUSAL_LM", **settings}
    )


def subject(name: str = "olmoe", dtype: str = "float32", std: float = 0.1, **settings: Any) -> Subject:
    base = MODELS[name](dtype=DTYPES[dtype])
    model = get_peft_model(copy.deepcopy(base), config(base, [1, 4, 6], **settings))
    randomize_adapters(model, std=std)
    made = Subject(base, token_batch(base), model)
    assert not torch.equal(made.logits(), made.plain)
    return made


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything but adapters, by the name that it has in a model without them."""
    weights = {}
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            weights[name.removeprefix("base_model.model.").replace("base_layer.", "")] = value.clone()
    return weights


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def changed(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """The kinds of modules whose weights differ."""
    names = [name for name in expected if not torch.equal(found[name], expected[name])]
    return {kind for kind in ("experts", "gate", "router", "self_attn") for name in names if f".{kind}." in name}


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: str = "float32") -> None:
    if dtype == "float32":
        assert_same(found, expected, "logits", rtol=1e-4, atol=1e-4)
        return
    # Rounding a merged weight may send a token to another expert: nearly all outputs are close, few are far.
    deviation = (found.double() - expected.double()).abs().mean() / expected.double().std()
    assert deviation < 0.06, f"logits deviate by {deviation:.3f} of their spread"


def tuner_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


# Switched off


@each_dtype
@each_model
def test_disabling_gives_the_outputs_of_the_base_model(name: str, dtype: str) -> None:
    one = subject(name, dtype)
    adapted = one.logits()
    with one.model.disable_adapter():
        assert torch.equal(one.logits(), one.plain)
    assert torch.equal(one.logits(), adapted)


@each_model
def test_disabling_a_merged_adapter_gives_the_outputs_of_the_base_model(name: str) -> None:
    one = subject(name)
    adapted = one.logits()
    one.model.merge_adapter()
    with one.model.disable_adapter():
        assert torch.equal(one.logits(), one.plain)
    assert_close(one.logits(), adapted)


# Merged


@each_dtype
@each_model
def test_merging_keeps_the_outputs_and_unmerging_gives_every_weight_back(name: str, dtype: str) -> None:
    one = subject(name, dtype)
    before, adapted = base_weights(one.model), one.logits()
    assert_same_weights(before, base_weights(one.base))
    with pytest.raises(AssertionError, match="logits"):
        assert_close(one.plain, adapted, dtype)
    for _ in range(3):
        one.model.merge_adapter()
        assert {"experts", "self_attn"} < changed(base_weights(one.model), before)
        assert_close(one.logits(), adapted, dtype)
        one.model.unmerge_adapter()
        assert_same_weights(base_weights(one.model), before)
        assert torch.equal(one.logits(), adapted)


@each_model
def test_merging_changes_the_selected_experts_only(name: str) -> None:
    one = subject(name, train_attention=False, train_router=False, train_shared_experts=False)
    one.model.merge_adapter()
    after, before = base_weights(one.model), base_weights(one.base)
    for key in before:
        if ".experts." not in key or "bias" in key:
            assert torch.equal(after[key], before[key])
        elif before[key].dim() == 3:
            differs = {int(i) for i in (after[key] != before[key]).flatten(1).any(1).nonzero()}
            assert differs == {1, 4, 6}
        else:
            expert = int(key.split(".experts.")[1].split(".")[0])
            assert torch.equal(after[key], before[key]) == (expert not in {1, 4, 6})


@each_model
def test_merging_twice_merges_once(name: str) -> None:
    one = subject(name)
    one.model.merge_adapter()
    merged = base_weights(one.model)
    with pytest.warns(UserWarning, match="already merged"):
        one.model.merge_adapter()
    assert_same_weights(base_weights(one.model), merged)
    one.model.unmerge_adapter()
    assert_same_weights(base_weights(one.model), base_weights(one.base))


@each_model
@pytest.mark.parametrize("where", ["experts", "self_attn"])
@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_a_broken_adapter_changes_nothing(name: str, where: str, action: str) -> None:
    """The last layer is the broken one: the others come before it."""
    one = subject(name)
    broken = [p for n, p in one.model.named_parameters() if f".{where}." in n and "lora_" in n and "_B." in n][-1]
    good = broken.detach().clone()
    broken.data.view(-1)[0] = float("nan")
    layers = tuner_layers(one.model)
    with pytest.raises(ValueError, match="finite|NaNs") as refusal:
        getattr(one.model, action)(safe_merge=True)
    assert isinstance(refusal.value, SieveError) or where != "experts"
    assert tuner_layers(one.model) == layers
    assert not any(module.merged for module in one.model.modules() if isinstance(module, BaseTunerLayer))
    assert_same_weights(base_weights(one.model), base_weights(one.base))
    broken.data.copy_(good)
    adapted = one.logits()
    one.model.merge_adapter(safe_merge=True)
    assert_close(one.logits(), adapted)


def test_a_refused_merge_keeps_what_was_merged_before() -> None:
    one = subject()
    one.model.add_adapter("second", config(one.base, [0, 2]))
    randomize_adapters(one.model, seed=3)
    one.model.merge_adapter(["default"])
    merged, outputs = base_weights(one.model), one.logits()
    broken = [p for n, p in one.model.named_parameters() if "lora_down_B.second" in n][-1]
    broken.data.fill_(float("inf"))
    with pytest.raises(SieveError, match="'second'"):
        one.model.merge_adapter(["second"], safe_merge=True)
    assert_same_weights(base_weights(one.model), merged)
    assert torch.equal(one.logits(), outputs)
    one.model.unmerge_adapter()
    assert_same_weights(base_weights(one.model), base_weights(one.base))


# Taken out


@each_dtype
@each_model
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_a_plain_model_with_the_outputs_of_the_adapted(
    name: str, dtype: str, merged_before: bool
) -> None:
    one = subject(name, dtype)
    adapted = one.logits()
    if merged_before:
        one.model.merge_adapter()
    plain = one.model.merge_and_unload()
    assert type(plain) is type(one.base)
    assert tuner_layers(plain) == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert plain.state_dict().keys() == one.base.state_dict().keys()
    assert_close(one.logits(plain), adapted, dtype)
    assert not torch.equal(one.logits(plain), one.plain)


@each_dtype
@each_model
@pytest.mark.parametrize("merged_before", [False, True])
def test_unload_gives_the_base_model(name: str, dtype: str, merged_before: bool) -> None:
    one = subject(name, dtype)
    if merged_before:
        one.model.merge_adapter()
    plain = one.model.unload()
    assert type(plain) is type(one.base)
    assert tuner_layers(plain) == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert_same_weights(plain.state_dict(), one.base.state_dict())
    assert torch.equal(one.logits(plain), one.plain)


@each_model
def test_an_unloaded_model_takes_another_adapter(name: str, recwarn: pytest.WarningsRecorder) -> None:
    one = subject(name)
    adapted = one.logits()
    again = get_peft_model(one.model.unload(), config(one.base, [1, 4, 6]))
    randomize_adapters(again)
    assert torch.equal(one.logits(again), adapted)
    assert [str(w.message) for w in recwarn if "peft" in str(w.message).lower()] == []


# Several adapters


def pair(name: str = "olmoe", **second: Any) -> tuple[Subject, dict[str, torch.Tensor]]:
    """A model with "default" and "second", and what it says with each, from models that have only that one."""
    one = subject(name)
    settings = {"r": 2, "lora_alpha": 6, "expert_projections": ["down_proj"], **second}
    one.model.add_adapter("second", config(one.base, [0, 4], **settings))
    randomize_adapters(one.model, seed=3)
    expected = {}
    for adapter in ("default", "second"):
        alone = get_peft_model(copy.deepcopy(one.base), copy.deepcopy(one.model.peft_config[adapter]))
        values = {n.replace(f".{adapter}.", ".default."): p for n, p in one.model.named_parameters()}
        for parameter_name, parameter in alone.named_parameters():
            parameter.data.copy_(values[parameter_name])
        expected[adapter] = one.logits(alone)
    return one, expected


@each_model
def test_switching_between_adapters_of_other_experts_ranks_and_projections(name: str) -> None:
    one, expected = pair(name)
    assert torch.equal(one.logits(), expected["default"])
    assert not torch.equal(expected["default"], expected["second"])
    for adapter in ("second", "default", "second"):
        one.model.set_adapter(adapter)
        assert torch.equal(one.logits(), expected[adapter])
        trainable = {n for n, p in one.model.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in one.model.named_parameters() if "lora_" in n and f".{adapter}." in n}
    with one.model.disable_adapter():
        assert torch.equal(one.logits(), one.plain)


@each_model
def test_an_added_adapter_is_neither_active_nor_trainable(name: str) -> None:
    one = subject(name)
    adapted = one.logits()
    trainable = {n for n, p in one.model.named_parameters() if p.requires_grad}
    one.model.add_adapter("second", config(one.base, [0, 4]))
    randomize_adapters(one.model, seed=1)
    assert one.model.active_adapters == ["default"]
    assert {n for n, p in one.model.named_parameters() if p.requires_grad} == trainable
    assert not torch.equal(adapted, one.plain)


@each_model
def test_two_active_adapters_add_up(name: str) -> None:
    """They overlap in expert 4; merging is by weights, so it tells what the sum of both is."""
    one, expected = pair(name, expert_projections=None)
    one.model.base_model.set_adapter(["default", "second"])
    both = one.logits()
    weights = [base_weights(one.base)]
    for adapters in (["default"], ["second"], ["default", "second"]):
        one.model.merge_adapter(adapters)
        weights.append(base_weights(one.model))
        if len(adapters) == 2:
            assert_close(one.logits(), both)
        one.model.unmerge_adapter()
    plain, first, second, summed = weights
    for key in plain:
        assert torch.allclose(summed[key] - plain[key], first[key] + second[key] - 2 * plain[key], atol=1e-5)
    for adapter in expected:
        assert not torch.allclose(both, expected[adapter], atol=1e-2)


@each_model
def test_deleting_an_adapter_leaves_the_other_working(name: str) -> None:
    one, expected = pair(name)
    one.model.delete_adapter("second")
    assert torch.equal(one.logits(), expected["default"])
    assert_no_trace(one.model, "second")


@each_model
def test_deleting_the_active_adapter_activates_the_other(name: str) -> None:
    one, expected = pair(name)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        one.model.delete_adapter("default")
    assert one.model.active_adapters == ["second"]
    assert torch.equal(one.logits(), expected["second"])
    assert_no_trace(one.model, "default")
    one.model.add_adapter("default", config(one.base, [2, 3]))
    one.model.set_adapter("default")
    assert torch.equal(one.logits(), one.plain)


def assert_no_trace(model: PeftModel, adapter: str) -> None:
    assert adapter not in model.peft_config
    assert [key for key in model.state_dict() if f".{adapter}." in key] == []
    for module in model.modules():
        if isinstance(module, SieveExpertLayer):
            known = {name: value for name, value in vars(module).items() if not name.startswith("_")}
            known |= dict(module.named_children())
            held = [name for name, v in known.items() if isinstance(v, dict | nn.ModuleDict) and adapter in v]
            assert held == []


@each_model
def test_deleting_a_merged_adapter_is_refused(name: str) -> None:
    """Or its values would stay in the weights, with nothing left to take them out by."""
    one, expected = pair(name)
    one.model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        one.model.delete_adapter("default")
    one.model.unmerge_adapter()
    assert torch.equal(one.logits(), expected["default"])


def test_adapters_on_different_layers() -> None:
    """Each has a layer that the other has not."""
    base = tiny_model("olmoe")
    alone = {"train_attention": False, "train_router": False}
    model = get_peft_model(
        copy.deepcopy(base), config(base, [], selected_experts=masks(base, [1, 4], layers=1), **alone), "first"
    )
    one = Subject(base, token_batch(base), model)
    randomize_adapters(model)
    outputs = {"first": one.logits()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    model.add_adapter("second", config(base, [], selected_experts={"model.layers.0.mlp.experts": [2]}, **alone))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    assert model.get_model_status().active_adapters == ["first"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(one.logits(), outputs["first"])
    model.set_adapter("second")
    outputs["second"] = one.logits()
    assert not torch.equal(outputs["second"], one.plain)
    assert not torch.equal(outputs["second"], outputs["first"])
    model.merge_adapter()
    assert_close(one.logits(), outputs["second"])
    model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(one.logits(), outputs["first"])


# What PEFT tells about it


@each_model
def test_status_and_counts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, _ = pair(name)
    layers = {status.name: status for status in one.model.get_layer_status()}
    experts = [status for path, status in layers.items() if path.endswith(".mlp.experts")]
    assert len(experts) == 2
    for status in experts:
        assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
        assert status.requires_grad == {"default": True, "second": False}
        assert sorted(status.available_adapters) == ["default", "second"]
    model = one.model.get_model_status()
    assert (model.peft_types, model.enabled) == ({"default": "SIEVE_LORA", "second": "SIEVE_LORA"}, True)
    assert model.requires_grad == {"default": True, "second": False}
    assert model.num_adapter_layers == len(layers)

    adapters = {n: p.numel() for n, p in one.model.named_parameters() if "lora_" in n}
    trainable = sum(count for n, count in adapters.items() if ".default." in n)
    total = sum(p.numel() for p in one.base.parameters()) + sum(adapters.values())
    assert (model.trainable_params, model.total_params) == (trainable, total)
    one.model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out

    one.model.merge_adapter()
    assert one.model.get_model_status().merged_adapters == ["default"]
    with one.model.disable_adapter():
        assert one.model.get_model_status().enabled is False


@each_model
def test_targets_are_named(name: str) -> None:
    one = subject(name)
    targeted = {*one.model.targeted_module_names, *one.model.targeted_parameter_names}
    assert set(masks(one.base, [])) <= targeted
    found = {path.removeprefix("base_model.model.") for path in tuner_layers(one.model)}
    # A router is named by its parameter.
    assert {path.removesuffix(".weight") for path in targeted} == found


@each_model
def test_rescaling_scales_expert_adapters_too(name: str) -> None:
    one = subject(name, train_attention=False, train_router=False, train_shared_experts=False)
    adapted = one.logits()
    with rescale_adapter_scale(one.model, 0.0):
        assert_close(one.logits(), one.plain)
    with rescale_adapter_scale(one.model, 0.5):
        halved = one.logits()
        one.model.merge_adapter()
        assert_close(one.logits(), halved)
        one.model.unmerge_adapter()
    assert torch.equal(one.logits(), adapted)
    layers: list[Any] = [module for module in one.model.modules() if hasattr(module, "scale_layer")]
    for back in (None, 0.5):
        for layer in layers:
            layer.scale_layer(0.5)
        assert_close(one.logits(), halved)
        for layer in layers:
            layer.unscale_layer(back)
        assert torch.equal(one.logits(), adapted)
    half = subject(name, train_attention=False, train_router=False, train_shared_experts=False, lora_alpha=4)
    assert_close(half.logits(), halved)
    assert not torch.allclose(halved, adapted, atol=1e-2)
