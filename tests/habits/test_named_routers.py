"""`target_modules` and `target_parameters` that name routers adapt those, once, as PEFT's LoRA does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from peft_sieve import EpngConfig, SieveError, SieveLoraConfig, export_lora
from tests.models import randomize_adapters, tiny_model, token_batch

FIRST = {"model.layers.0.mlp.experts": [1, 5]}
BOTH = {**FIRST, "model.layers.1.mlp.experts": [0, 2]}
GATES = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
NAMES: dict[str, dict[str, Any]] = {
    "a name": {"target_modules": ["q_proj", "gate"]},
    "full names": {"target_modules": ["q_proj", *GATES]},
    "a pattern": {"target_modules": r".*\.(q_proj|gate)"},
    "a parameter": {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
    "a parameter beside a pattern": {"target_modules": r".*\.q_proj", "target_parameters": ["mlp.gate.weight"]},
}


def config(kind: Any = SieveLoraConfig, **settings: Any) -> Any:
    return kind(**{"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "selected_experts": BOTH, **settings})


def ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Router -> rank."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, ParamWrapper) and name in m.r}
    assert not any(isinstance(m.base_layer, ParamWrapper) for m in found.values())  # none is adapted twice
    return {path.removeprefix("base_model.model."): m.r[name] for path, m in found.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


@pytest.mark.parametrize("kind", [SieveLoraConfig, EpngConfig])
@pytest.mark.parametrize("train_router", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_as_in_plain_lora(name: str, train_router: bool, kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = get_peft_model(tiny_model("olmoe"), config(kind, train_router=train_router, **NAMES[name]))
    assert ranks(model) == dict.fromkeys(GATES, 2)
    assert not set(GATES) & set(model.base_model.targeted_module_names)
    assert {f"{gate}.weight" for gate in GATES} < set(model.base_model.targeted_parameter_names)
    randomize_adapters(model, std=0.5)
    for parameter_name, parameter in model.named_parameters():
        if "lora_gate_up_B" in parameter_name or "lora_down_B" in parameter_name:
            parameter.data.zero_()
    plain = get_peft_model(tiny_model("olmoe"), LoraConfig(r=2, lora_alpha=4, **NAMES[name]))
    saved = get_peft_model_state_dict(model)
    kept = {key: value for key, value in saved.items() if ".experts." not in key}
    assert kept.keys() == get_peft_model_state_dict(plain).keys()
    set_peft_model_state_dict(plain, kept)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_model("olmoe")), atol=1e-2)


def test_another_name_of_it() -> None:
    base = tiny_model("jamba")
    mask = {"model.layers.1.feed_forward.experts": [1]}
    model = get_peft_model(base, config(selected_experts=mask, target_modules=["router"], train_router=False))
    assert ranks(model) == {"model.layers.1.feed_forward.router": 2}


@pytest.mark.parametrize("name", ["a name", "a parameter"])
def test_named_ones_are_adapted_outside_the_mask_too(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("olmoe"), config(selected_experts=FIRST, target_modules=["q_proj"]))
    assert ranks(model) == {GATES[0]: 2}
    model = get_peft_model(tiny_model("olmoe"), config(selected_experts=FIRST, **NAMES[name]))
    assert ranks(model) == dict.fromkeys(GATES, 2)
    randomize_adapters(model)
    adapted = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "a")
    assert torch.equal(logits(loaded), adapted) and ranks(loaded) == ranks(model)
    export_lora(tmp_path / "a", tmp_path / "plain", base_model=tiny_model("olmoe"), layout="stacked")
    exported = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "plain")
    assert torch.allclose(logits(exported), adapted, atol=1e-4)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.merge_adapter()
    assert torch.allclose(logits(model), adapted, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_excluded_saved_and_other_layers() -> None:
    def adapted(**settings: Any) -> dict[str, int]:
        given = {**NAMES["a name"], "train_router": False, **settings}
        return ranks(get_peft_model(tiny_model("olmoe"), config(**given)))

    assert adapted(exclude_modules=["layers.0.mlp.gate"]) == {GATES[1]: 2}
    assert adapted(layers_to_transform=[0]) == {GATES[0]: 2}
    assert adapted(modules_to_save=["gate"]) == {}
    assert adapted(target_modules="all-linear") == {}
    assert adapted(target_modules="all-linear", target_parameters=["gate.weight"]) == dict.fromkeys(GATES, 2)
    assert adapted(target_modules=None, target_parameters=["layers.1.mlp.gate.weight"]) == {GATES[1]: 2}


def test_patterns() -> None:
    settings = {"rank_pattern": {"mlp.gate": 3, "0.mlp.gate.weight": 5}, "alpha_pattern": {r"1\.mlp\.gate": 12}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = get_peft_model(tiny_model("olmoe"), config(**NAMES["a name"], **settings))
    assert ranks(model) == {GATES[0]: 5, GATES[1]: 3}
    wrapper: Any = model.base_model.model.get_submodule(GATES[1])
    assert wrapper.scaling["default"] == 12 / 3


def test_a_second_adapter_and_their_sum() -> None:
    model = get_peft_model(tiny_model("olmoe"), config(target_modules=["q_proj"], train_router=False), "one")
    model.add_adapter("two", config(**NAMES["a name"], selected_experts=FIRST))
    assert ranks(model, "one") == {} and ranks(model, "two") == dict.fromkeys(GATES, 2)
    randomize_adapters(model)
    model.base_model.set_adapter(["one", "two"])
    together = logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert ranks(model, "sum") == dict.fromkeys(GATES, 4)
    assert torch.allclose(logits(model), together, atol=1e-4)


def test_experts_are_not_named_by_parameters() -> None:
    for names in (["gate.weight", "mlp.experts.down_proj"], ["gate.weight", "mlp.foo"], ["q_proj.weight"], ["weight"]):
        with pytest.raises(SieveError, match="target_parameters must be None or name weights of routers"):
            get_peft_model(tiny_model("olmoe"), config(target_parameters=names))
