"""The functions and methods of PEFT and transformers that scripts call on a model with adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.experts.layer import expert_layers
from tests.models import randomize_adapters, tiny_model, token_batch


def config(base: nn.Module, ids: list[int] | None = None, **settings: Any) -> SieveLoraConfig:
    mask = dict.fromkeys((layer.path for layer in find_moe_layers(base)), [1, 4, 6] if ids is None else ids)
    return SieveLoraConfig(**{"r": 4, "lora_alpha": 8, "selected_experts": mask, "task_type": "CAUSAL_LM", **settings})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


def saved(folder: Path, seed: int, ids: list[int] | None = None, **settings: Any) -> torch.Tensor:
    """An adapter in a folder; returns the outputs of the model that has it."""
    base = tiny_model("olmoe")
    model = get_peft_model(base, config(base, ids, **settings))
    randomize_adapters(model, seed=seed)
    model.save_pretrained(folder)
    return logits(model)


# Hot-swapping


def test_hotswap_under_the_same_mask(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, lora_alpha=6, lora_dropout=0.05)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "a")
    assert torch.equal(logits(model), first)
    hotswap_adapter(model, str(tmp_path / "b"), "default", torch_device="cpu")
    assert torch.equal(logits(model), second)
    assert not torch.equal(first, second)
    hotswap_adapter(model, str(tmp_path / "a"), "default", torch_device="cpu")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize(
    ("ids", "settings"),
    [
        ([1, 4, 7], {}),
        ([1, 4], {}),
        (None, {"r": 2}),
        (None, {"expert_projections": ["down_proj"]}),
        (None, {"train_router": False}),
    ],
)
def test_hotswap_to_other_experts_ranks_or_modules_is_refused(
    ids: list[int] | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Also when the adapter that is active at the moment has those experts."""
    first = saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2, ids, **settings)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "a")
    model.load_adapter(str(tmp_path / "b"), "other")
    for active in ("default", "other"):
        model.set_adapter(active)
        with pytest.raises(SieveError, match=r"other experts, ranks or modules than adapter 'default'.*load_adapter"):
            hotswap_adapter(model, str(tmp_path / "b"), "default", torch_device="cpu")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_hotswap_with_patterns_is_refused(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1, rank_pattern={"q_proj": 2})
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "a")
    with pytest.raises(SieveError, match="rank_pattern.*alpha_pattern.*load_adapter"):
        hotswap_adapter(model, str(tmp_path / "a"), "default", torch_device="cpu")
    assert torch.equal(logits(model), first)


def test_preparing_for_compiled_hotswap_is_refused() -> None:
    """Under the name that the module has now: one imported before this package is PEFT's own."""
    model = get_peft_model(tiny_model("olmoe"), config(tiny_model("olmoe")))
    with pytest.raises(SieveError, match="prepare_model_for_compiled_hotswap .*not supported.*Leave the call out"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert {type(layer.scaling["default"]) for _, layer in expert_layers(model)} == {float}
    assert model.peft_config["default"].r == 4


# Without PeftModel


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_inject_adapter_in_model_and_the_state_dict(low_cpu_mem_usage: bool) -> None:
    base = tiny_model("qwen2_moe")
    model = get_peft_model(copy.deepcopy(base), config(base))
    randomize_adapters(model)
    state = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    assert state and all(".lora_" in name and ".default" not in name for name in state)

    injected = inject_adapter_in_model(config(base), base, low_cpu_mem_usage=low_cpu_mem_usage)
    assert injected is base
    on_meta = [p for p in injected.parameters() if p.is_meta]
    assert bool(on_meta) == low_cpu_mem_usage
    plain = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    result = set_peft_model_state_dict(injected, plain, low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.unexpected_keys == []
    assert not any("lora_" in key for key in result.missing_keys)
    assert torch.equal(logits(injected), logits(model))
    assert {k: v.tolist() for k, v in get_peft_model_state_dict(injected).items()} == {
        k: v.tolist() for k, v in plain.items()
    }
    wrong = {name: value for name, value in plain.items() if "layers.1.mlp.experts" not in name}
    with pytest.raises(SieveError, match="layers.1.mlp.experts"):
        set_peft_model_state_dict(injected, wrong)
    assert torch.equal(logits(injected), logits(model))


def test_injecting_by_a_state_dict_is_refused_and_leaves_the_base_as_it_is() -> None:
    base = tiny_model("olmoe")
    state = get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), config(base)))
    with pytest.raises(ValueError, match="please inject the adapter without the state_dict"):
        inject_adapter_in_model(config(base), base, state_dict=state)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")


def test_transformers_own_methods(tmp_path: Path) -> None:
    base = tiny_model("olmoe")
    plain = logits(base)
    alone = {"first": saved(tmp_path / "first", 1), "second": saved(tmp_path / "second", 2, [0, 7], r=2)}
    base.load_adapter(str(tmp_path / "first"), "first")
    base.load_adapter(str(tmp_path / "second"), "second")
    for name in ("first", "second", "first"):
        base.set_adapter(name)
        assert base.active_adapters() == [name]
        assert torch.equal(logits(base), alone[name])
    assert set(base.get_adapter_state_dict("second")) == set(base.get_adapter_state_dict("first"))
    assert base.get_adapter_state_dict("second")["model.layers.0.mlp.experts.lora_down_A.weight"].shape == (2, 2, 24)
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    assert torch.equal(logits(base), alone["first"])
    base.set_adapter(["first", "second"])
    both = logits(base)
    assert not any(torch.allclose(both, other, atol=1e-2) for other in alone.values())
    base.delete_adapter("first")
    assert base.active_adapters() == ["second"] and list(base.peft_config) == ["second"]
    assert torch.equal(logits(base), alone["second"])
    base.add_adapter(config(base, [2]), "third")
    base.set_adapter("third")
    trainable = [name for name, p in base.named_parameters() if p.requires_grad]
    assert trainable and all(".third." in name for name in trainable)
    assert torch.equal(logits(base), plain)


def test_a_mixed_model_is_refused_and_the_base_stays_as_it_is() -> None:
    base = tiny_model("olmoe")
    with pytest.raises(ValueError, match="SIEVE_LORA.* not compatible with the `PeftMixedModel`"):
        get_peft_model(base, config(base), mixed=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")


# Names


def test_names_that_tools_look_for(capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_model("qwen2_moe")
    model = get_peft_model(base, config(base))
    model.add_adapter("second", config(base, [0]))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for n, p in model.named_parameters() if ".default." in n)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out

    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    assert isinstance(model.peft_config["second"], SieveLoraConfig)
    assert model.active_peft_config is model.peft_config["default"]
    assert model.peft_type == model.peft_config["default"].peft_type == "SIEVE_LORA"
    assert model.peft_config["default"].to_dict()["selected_experts"]
    assert isinstance(PeftConfig.from_peft_type(**model.peft_config["default"].to_dict()), SieveLoraConfig)

    experts = {layer.path for layer in find_moe_layers(base)}
    modules, parameters = set(model.targeted_module_names), set(model.targeted_parameter_names)
    assert experts | {f"model.layers.{i}.mlp.gate.weight" for i in range(2)} == parameters
    assert "model.layers.1.mlp.shared_expert.up_proj" in modules and not modules & parameters

    layers, status = get_layer_status(model), get_model_status(model)
    targeted = {path.removesuffix(".weight") for path in modules | parameters}
    assert {layer.name for layer in layers} == {f"model.{path}" for path in targeted}
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["default"]
    assert (status.trainable_params, status.total_params) == (trainable, total)
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    injected = model.unload()
    injected.add_adapter(config(base))
    assert get_model_status(injected).available_adapters == ["default"]


def test_several_active_at_once_and_grads_on_request() -> None:
    base = tiny_model("olmoe")
    model = get_peft_model(base, config(base))
    model.add_adapter("second", config(base, [0]))
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default", "second"}
    model.set_requires_grad("second", False)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.set_adapter("second", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype(autocast: bool) -> None:
    base = tiny_model("olmoe", dtype=torch.bfloat16)
    model = get_peft_model(base, config(base), autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}


# Files


def test_nothing_is_pickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", never)
    monkeypatch.setattr(torch, "load", never)
    base = tiny_model("olmoe")
    model = get_peft_model(base, config(base, modules_to_save=["lm_head"], trainable_token_indices=[3]))
    model.add_adapter("second", config(base, [0], trainable_token_indices=[5]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    loaded.load_adapter(str(tmp_path / "second"), "second")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert any(name.endswith("lora_experts.slots") for name in file.keys())  # noqa: SIM118 (no mapping)


def test_pickled_files_are_neither_written_nor_read(tmp_path: Path) -> None:
    base = tiny_model("olmoe")
    model = get_peft_model(base, config(base))
    for arguments in ((tmp_path / "new", False), (tmp_path / "new",)):
        keywords = {} if len(arguments) == 2 else {"safe_serialization": False}
        with pytest.raises(SieveError, match="safe_serialization=False"):
            model.save_pretrained(*map(str, arguments[:1]), *arguments[1:], **keywords)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path)
    torch.save(get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    base = tiny_model("olmoe")
    with pytest.raises(SieveError, match=r"adapter_model.bin, a pickled file.*adapter_model.safetensors"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
