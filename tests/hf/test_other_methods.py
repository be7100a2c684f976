"""Adapters of PEFT's own methods take no detour through this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

import peft_sieve
from tests.models import tiny_model, token_batch

PACKAGE = str(Path(peft_sieve.__file__).parent)
# What looks at a configuration or at the type of an adapter, and passes on.
PASSES_ON = {
    *("replacement", "method_of", "adapters_of_package", "_save_pretrained", "_create_or_update_model_card"),
    *("_from_json_file", "check_config_file", "finish_interrupted_saves", "finish_interrupted_save", "methods"),
    *(
        "_refuse_other_type",
        "_from_pretrained",
        "_load_adapter",
        "_load_adapter_in_transformers",
        "loading",
        "__init__",
    ),
    *("explained", "_placed_as_it_is", "is_offloaded", "_is_swap", "innermost"),
}


def calls_of(run: Callable[[], Any]) -> dict[str, int]:
    """How often each function of the package is called while something runs; tensors among their arguments are told."""
    counts: dict[str, int] = {}

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            name = frame.f_code.co_name
            counts[name] = counts.get(name, 0) + 1
            for value in frame.f_locals.values():
                held = (
                    value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
                )
                if any(isinstance(one, torch.Tensor) for one in held):
                    counts["a tensor"] = counts.get("a tensor", 0) + 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {name: count for name, count in counts.items() if not name.startswith("<")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    model = get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("step", ["read", "load", "load a second one", "load in transformers", "save"])
def test_an_ordinary_lora_is_only_passed_on(step: str, saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were opened, or a model was gone through")

    monkeypatch.setattr("peft_sieve.hf.adapter_files.safe_open", refuse)
    monkeypatch.setattr("peft_sieve.hf.injection.Snapshot.__init__", refuse)
    base = tiny_model("olmoe")
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), saved)
    steps: dict[str, Callable[[], Any]] = {
        "read": lambda: PeftConfig.from_pretrained(saved),
        "load": lambda: PeftModel.from_pretrained(base, saved),
        "load a second one": lambda: loaded.load_adapter(str(saved), adapter_name="second"),
        "load in transformers": lambda: base.load_adapter(str(saved)),
        "save": lambda: loaded.save_pretrained(str(tmp_path)),
    }
    counts = calls_of(steps[step])
    assert 0 < sum(counts.values()) < 40, counts
    assert set(counts) <= PASSES_ON, set(counts) - PASSES_ON


def test_the_count_sees_what_it_should(saved: Path) -> None:
    """An adapter of this package is gone through, and the counts say so."""
    model = tiny_model("olmoe")
    config = peft_sieve.SieveLoraConfig(r=2, selected_experts={"model.layers.0.mlp.experts": [1]})
    counts = calls_of(lambda: get_peft_model(model, config)(**token_batch(model)))
    assert not set(counts) <= PASSES_ON and counts["a tensor"] > 0
