"""What is active once an adapter is deleted, and what is left of modules that were trained whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from tests.models import tiny_model, token_batch

BOTH = {f"model.layers.{layer}.mlp.experts": [1, 6] for layer in range(2)}
COMMON: dict[str, Any] = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": False}
HEAD = {"modules_to_save": ["lm_head"]}
CONFIGS: dict[str, Callable[..., Any]] = {
    "sieve": lambda **more: SieveLoraConfig(**{**COMMON, "selected_experts": BOTH, **more}),
    "esft": lambda **more: SieveLoraConfig(**{**COMMON, "selected_experts": BOTH, "expert_tuning": "full", **more}),
    "epng": lambda **more: EpngConfig(**{**COMMON, "selected_experts": BOTH, **more}),
    "perft": lambda **more: PerftConfig(**{**COMMON, **more}),
    "lora_moe": lambda **more: LoraMoeConfig(**{**COMMON, "num_experts": 3, **more}),
}
WHOLE = [(method, HEAD) for method in CONFIGS] + [(m, {"trainable_token_indices": [3, 9]}) for m in ("sieve", "epng")]


def adapted(adapters: dict[str, Any]) -> Any:
    """A model with these adapters, all of them with random values; the first one is active."""
    first, *others = adapters
    model = get_peft_model(tiny_model("olmoe"), adapters[first], first)
    for name in others:
        model.add_adapter(name, adapters[name])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in f"{name}." for adapter in adapters) and parameter.is_floating_point():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**token_batch(model)).logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_active(model: PeftModel, names: list[str]) -> None:
    """Everywhere, as far as it is there."""
    assert model.active_adapters == model.base_model.active_adapters == names
    assert model.active_adapter == (names[0] if names else [])
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            assert module.active_adapters == [name for name in names if name in module._adapters]
        elif isinstance(module, model.base_model.tuner_layer_cls):
            assert module.active_adapters == names


@pytest.mark.parametrize(("method", "whole"), WHOLE)
def test_the_next_one_is_active_with_all_that_it_has(method: str, whole: dict[str, Any]) -> None:
    model = adapted({name: CONFIGS[method](**whole) for name in ("first", "second", "third")})
    model.set_adapter("second")
    expected, names = logits(model), trained(model)
    model.set_adapter("first")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("first")
    assert_active(model, ["second"])
    assert torch.equal(logits(model), expected) and trained(model) == names
    assert not any(".first." in f"{name}." for name, _ in model.named_parameters())
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert_active(model, [])
    assert torch.equal(model.base_model(**token_batch(model)).logits, logits(tiny_model("olmoe")))
    model.add_adapter("fourth", CONFIGS[method](**whole))
    model.set_adapter("fourth")
    assert_active(model, ["fourth"])
    assert not torch.equal(logits(model), logits(tiny_model("olmoe")))


@pytest.mark.parametrize("method", ["sieve", "esft", "epng", "perft"])
def test_layers_with_other_adapters_choose_no_other(method: str) -> None:
    def in_layer(*layers: int) -> Any:
        return CONFIGS[method](layers_to_transform=list(layers))

    model = adapted({"first": in_layer(0, 1), "second": in_layer(0), "third": in_layer(1)})
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert_active(model, ["second"])
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_of_several_the_others_stay_active(method: str) -> None:
    adapters = {name: CONFIGS[method]() for name in ("first", "second", "third")}
    model = adapted({**adapters, "first": CONFIGS[method](**HEAD)})
    model.base_model.set_adapter(["second", "third"])
    model.set_requires_grad("third", False)
    expected, names = logits(model), trained(model)
    model.base_model.set_adapter(["first", "second", "third"])
    model.set_requires_grad("third", False)
    model.delete_adapter("first")
    assert_active(model, ["second", "third"])
    assert torch.equal(logits(model), expected) and trained(model) == names


@pytest.mark.parametrize(("method", "whole"), WHOLE)
def test_one_that_is_not_active_takes_nothing_along(method: str, whole: dict[str, Any]) -> None:
    model = adapted({name: CONFIGS[method](**whole) for name in ("first", "second")})
    model.set_requires_grad("first", False)
    expected = logits(model)
    model.delete_adapter("second")
    assert_active(model, ["first"])
    assert torch.equal(logits(model), expected) and trained(model) == set()


def test_nothing_is_told_of_an_active_one_where_none_is() -> None:
    for method, question in (("epng", "ledger"), ("lora_moe", "expert_utilization")):
        model = adapted({"first": CONFIGS[method]()})
        model.delete_adapter("first")
        with pytest.raises(SieveError, match="adapter ''"):
            getattr(model, question)()


def test_one_that_was_loaded_for_inference_stays_frozen(tmp_path: Path) -> None:
    adapted({"default": CONFIGS["sieve"](**HEAD)}).save_pretrained(tmp_path)
    model = adapted({"first": CONFIGS["sieve"](**HEAD)})
    model.load_adapter(tmp_path, "loaded")
    model.delete_adapter("first")
    assert_active(model, ["loaded"])
    assert trained(model) == set()


def test_a_merged_one_is_not_deleted() -> None:
    model = adapted({"first": CONFIGS["sieve"](**HEAD), "second": CONFIGS["sieve"](**HEAD)})
    model.merge_adapter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['first'\] while they are merged"):
        model.delete_adapter("first")
    with pytest.raises(ValueError, match="Adapter none does not exist"):
        model.delete_adapter("none")
    assert_active(model, ["first"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["sieve", "epng", "perft"])
def test_in_transformers(method: str) -> None:
    model = tiny_model("olmoe")
    for name, layers in (("first", [0, 1]), ("gone", [0, 1]), ("second", [0]), ("third", [1])):
        model.add_adapter(CONFIGS[method](layers_to_transform=layers), name)
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("first")
    model.delete_adapter(["first", "gone"])
    assert torch.equal(logits(model), expected) and set(model.peft_config) == {"second", "third"}
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("second",)}
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert torch.equal(logits(model), logits(tiny_model("olmoe")))


@pytest.mark.parametrize(("method", "whole"), WHOLE)
def test_unload_gives_modules_that_were_trained_whole_back(method: str, whole: dict[str, Any]) -> None:
    model = adapted({"first": CONFIGS[method](**whole), "second": CONFIGS[method](**whole)})
    unloaded, base = model.unload().state_dict(), tiny_model("olmoe").state_dict()
    assert unloaded.keys() == base.keys()
    assert [name for name, value in unloaded.items() if not torch.equal(value, base[name])] == []
