"""What an adapter holds, read without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_sieve import PerftConfig, SieveError, inspect_adapter
from peft_sieve.cli import main
from tests.adapters.saved import SHARED, Adapter, saved_adapter
from tests.models import tiny_model, token_batch

LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    batch = token_batch(tiny_model("qwen2_moe"))
    calibration = {"calib_dataset": [batch, batch], "calib_stability": 0.5, "top_k": 3}
    return saved_adapter(tmp_path_factory.mktemp("qwen"), "qwen2_moe", selected_experts=None, **calibration)


def test_it_tells_what_the_model_holds(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is made")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    monkeypatch.setattr(PeftModel, "__init__", refuse)
    summary = inspect_adapter(adapter.path)
    config = adapter.model.peft_config["default"]
    parameters = {name: p for name, p in adapter.model.named_parameters() if "lora_" in name}
    assert summary.num_parameters == sum(p.numel() for p in parameters.values())
    experts = sum(p.numel() for name, p in parameters.items() if ".mlp.experts." in name)
    assert summary.expert_parameters == experts
    # 3 of 8 experts a layer.
    assert summary.all_experts_parameters == experts // 3 * 8
    assert {layer.path: list(layer.experts) for layer in summary.layers} == config.selected_experts
    assert {layer.path: layer.coverage for layer in summary.layers} == config.calibration["coverage"]
    assert all(layer.num_experts == 8 for layer in summary.layers)
    assert all(layer.ranks == {"gate_up": 6, "down": 4} for layer in summary.layers)
    modules = {module.name: module for module in summary.modules}
    assert set(modules) == {
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")),
        "mlp.gate",
    }
    assert modules["self_attn.o_proj"].ranks == (3,)
    assert modules["self_attn.q_proj"].ranks == (4,)
    assert all(module.count == 2 for module in summary.modules)
    assert summary.expert_parameters + sum(m.num_parameters for m in summary.modules) == summary.num_parameters
    assert summary.base_model == str(adapter.base_path)
    assert summary.num_bytes == (adapter.path / "adapter_model.safetensors").stat().st_size
    assert summary.dtypes == ("F32",)
    assert summary.calibration == config.calibration


@pytest.mark.parametrize("shared", SHARED)
def test_what_experts_share(shared: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", **SHARED[shared])
    summary = inspect_adapter(adapter.path)
    config, model = adapter.model.peft_config["default"], adapter.model
    parameters = {name: p.numel() for name, p in model.named_parameters() if ".mlp.experts.lora_" in name}
    assert {layer.path: list(layer.experts) for layer in summary.layers} == config.selected_experts
    for layer in summary.layers:
        assert layer.num_parameters == sum(n for name, n in parameters.items() if layer.path in name)
        assert layer.ranks == layer.lowest_ranks == {"gate_up": 6, "down": 4}
    every = saved_adapter(
        tmp_path / "every", "olmoe", share_outer=config.share_outer, selected_experts={p: range(8) for p in LAYERS}
    )
    of_all = inspect_adapter(every.path)
    assert summary.all_experts_parameters == of_all.all_experts_parameters == of_all.expert_parameters
    assert (summary.cold_experts, summary.share_outer) == (config.cold_experts, config.share_outer)
    facts, layers, _ = summary.to_tables()
    text = dict(facts.rows)["shared"]
    assert ("all other experts" in text, "B of down_proj" in text) == (
        "cold_experts" in SHARED[shared],
        config.share_outer,
    )
    assert [row[1] for row in layers.rows] == [f"{len(layer.experts)} of 8" for layer in summary.layers]
    assert json.loads(json.dumps(summary.to_dict()))["share_outer"] is config.share_outer


def test_what_is_no_factor_is_counted_apart(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", modules_to_save=["lm_head"])
    summary = inspect_adapter(adapter.path)
    assert summary.other_tensors == 128 * 32
    assert summary.calibration == {}
    assert "shared" not in dict(summary.to_tables()[0].rows)


def test_command(adapter: Adapter, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(adapter.path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["num_parameters"] == inspect_adapter(adapter.path).num_parameters
    assert content["layers"][1]["experts"] == list(inspect_adapter(adapter.path).layers[1].experts)
    assert main(["inspect", str(adapter.path)]) == 0
    text = capsys.readouterr().out
    summary = inspect_adapter(adapter.path)
    for part in (
        "model.layers.1.mlp.experts",
        "3 of 8",
        f"{summary.layers[0].coverage:.1%}",
        f"{summary.num_parameters:,}",
        "37.5% of the",
        "self_attn.q_proj",
        str(summary.calibration["fingerprint"]),
        "strategy",
        "1.00 or more in each layer",  # two equal halves
    ):
        assert part in text, part


def test_what_a_notebook_shows(adapter: Adapter) -> None:
    summary = inspect_adapter(adapter.path)
    facts, layers, modules = summary.to_tables()
    assert dict(facts.rows)["base model"] == str(adapter.base_path)
    assert layers.rows[1][:2] == ("model.layers.1.mlp.experts", "3 of 8")
    assert layers.rows[1][5] == " ".join(map(str, summary.layers[1].experts))
    assert [row[0] for row in modules.rows] == [module.name for module in summary.modules]
    named = replace(summary, adapter="<me>", modules=())
    assert len(named.to_tables()) == 2
    assert named._repr_html_().count("<table>") == 2
    assert "&lt;me&gt;" in named._repr_html_() and "<me>" not in named._repr_html_()


def test_bad_adapters(adapter: Adapter, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SieveError, match="No adapter can be read from"):
        inspect_adapter(tmp_path / "nothing")
    plain = get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(SieveError, match="an adapter of type LORA, not SIEVE_LORA"):
        inspect_adapter(tmp_path / "plain")
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter.path / "adapter_config.json").read_bytes())
    with pytest.raises(SieveError, match="does not have a readable adapter_model.safetensors"):
        inspect_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"12345")
    with pytest.raises(SieveError, match="cannot be read as safetensors"):
        inspect_adapter(folder)
    assert main(["inspect", str(folder)]) == 1
    assert "peft-sieve inspect: " in capsys.readouterr().err


def test_what_is_no_path_and_what_is_no_sieve_adapter(tmp_path: Path) -> None:
    with pytest.raises(SieveError, match="adapter must be the path or Hub id of a saved adapter, got None"):
        inspect_adapter(None)
    get_peft_model(tiny_model("olmoe"), PerftConfig(r=2)).save_pretrained(tmp_path)
    with pytest.raises(SieveError, match="of type PERFT, not SIEVE_LORA or SIEVE_EPNG.*PERFT and LoRA experts"):
        inspect_adapter(tmp_path)
