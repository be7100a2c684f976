"""What registering gives holds for every method, the one of these tests included."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_sieve import SieveError, SieveLoraConfig, register_score
from peft_sieve.hf.methods import method_of, methods
from peft_sieve.routing import scores
from tests.hf.saver import MASK, METHODS, factors, save_again_and_again
from tests.models import tiny_model, token_batch
from tests.tuners.test_save_load import needs_fork


def test_all_methods_are_here() -> None:
    assert {method_of(make()) for make, _ in METHODS.values()} == set(methods())


def check_whole(method: str, folder: Path) -> None:
    """What is in the folder is one version."""
    model = PeftModel.from_pretrained(tiny_model("olmoe"), folder)
    version = getattr(model.peft_config["default"], METHODS[method][1])
    assert factors(model) and all(bool((factor == version).all()) for factor in factors(model))


@needs_fork
@pytest.mark.parametrize("method", METHODS)
def test_saves_survive_kills(method: str, tmp_path: Path) -> None:
    """Killed at random moments, a save leaves the old version or the new one, and never a mixture that loads."""
    generator = random.Random(method)
    model = get_peft_model(tiny_model("olmoe"), METHODS[method][0]())
    for _ in range(15):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(60)
                save_again_and_again(model, method, str(tmp_path), partial(os.write, writing, b"."))
            finally:
                os._exit(1)
        os.close(writing)
        for _ in range(2):  # whole saves
            assert os.read(reading, 1), "the child failed"
        time.sleep(generator.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        os.close(reading)
        check_whole(method, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_pickled_files_are_refused(method: str, tmp_path: Path) -> None:
    """As they could not be loaded again."""
    model = get_peft_model(tiny_model("olmoe"), METHODS[method][0]())
    with pytest.raises(SieveError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_another_type_in_the_file_is_told(method: str, tmp_path: Path) -> None:
    """By settings that only the method has, without opening the weights."""
    get_peft_model(tiny_model("olmoe"), METHODS[method][0]()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))
    if method == "toy":  # which did not say what is its own
        assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"
        return
    with pytest.raises(SieveError, match="peft_type 'LORA'"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "note", [{"dataset": "x"}, {"tokens": "many"}, {"samples": 3, "coverage": 0.5}, {"coverage": {"a": "b"}}]
)
def test_a_calibration_note_may_lack_anything(note: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("olmoe"), SieveLoraConfig(r=2, selected_experts=MASK, calibration=note))
    model.save_pretrained(tmp_path)
    assert "Calibrated on" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert PeftConfig.from_pretrained(tmp_path).calibration == note


LOAD = """
import sys, torch, peft_sieve
from peft import PeftModel
from tests.models import tiny_model, token_batch
model = PeftModel.from_pretrained(tiny_model("olmoe"), sys.argv[1], is_trainable=True)
torch.save(model.eval()(**token_batch(model)).logits, sys.argv[2])
"""


def test_a_score_is_needed_for_calibrating_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter whose experts were selected by a registered score loads where nobody registered it."""
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))  # other tests see the package's own
    register_score("of_this_test", lambda profile, layer: profile.counts[layer])
    base = tiny_model("olmoe")
    config = SieveLoraConfig(r=2, score="of_this_test", calib_dataset=[token_batch(base)], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    words = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path), str(tmp_path / "logits.pt")]
    subprocess.run(words, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**token_batch(model)).logits)
    with pytest.raises(SieveError, match="score must be one of"):
        SieveLoraConfig(score="of_no_test", calib_dataset=["text"])
    with pytest.raises(SieveError, match="score must be a non-empty string"):
        SieveLoraConfig(score="", selected_experts=MASK)
