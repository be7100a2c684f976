"""The code of docs/methods/esft.md and hellora.md runs as it stands, and their figures are as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sieve import RoutingProfile, SieveLoraConfig, hellora_config
from tests.paper_models import OLMOE

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", page(name), flags=re.DOTALL)
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": name}
    exec(compile("\n".join(blocks), f"docs/methods/{name}.md", "exec"), names)
    return names


def test_esft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("esft", tmp_path, monkeypatch)
    written = json.loads((tmp_path / "out" / "esft" / "adapter" / "adapter_config.json").read_text())
    assert (written["expert_tuning"], written["calibration"]["score"]) == ("full", "esft_token")
    assert {len(ids) for ids in names["selection"].values()} == {4}


def test_hellora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("hellora", tmp_path, monkeypatch)
    written = json.loads((tmp_path / "out" / "hellora" / "adapter" / "adapter_config.json").read_text())
    assert {len(ids) for ids in written["selected_experts"].values()} == {4}
    assert written["calibration"]["samples"] == 4
    assert names["hellori"].peft_config["default"].hellori_density == 0.1
    for field in re.findall(r"^\| `(hellori_\w+)` \| (\w+) \|", page("hellora"), flags=re.MULTILINE):
        assert str(getattr(SieveLoraConfig(), field[0])) == field[1]


def test_the_share_of_parameters_on_olmoe() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OLMOE)
    layers = [f"model.layers.{layer}.mlp.experts" for layer in range(16)]
    profile = RoutingProfile.from_arrays([list(range(64))] * 16, num_experts_per_tok=8, layer_names=layers)
    model = get_peft_model(model, hellora_config(profile))
    assert f"{model.get_nb_trainable_parameters()[0] / 311_459_840:.1%}" == "15.2%"  # of LoRA on all: test_sizes.py
    assert "15.2%" in page("hellora")
