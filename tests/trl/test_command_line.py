"""`peft-sieve run --sieve ... -- trl sft --use_peft` trains a sparse adapter."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from trl import ModelConfig
from trl.trainer import utils

from peft_sieve import SieveError, SieveLoraConfig
from tests.commands.test_run import finished
from tests.hub_standin import HubStandIn
from tests.models import TINY_OLMOE
from tests.pages import ROOT, blocks, commands
from tests.trl.scripts import questions


@pytest.fixture
def trl_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that replaces TRL's function, which is put back."""
    monkeypatch.setattr(utils, "get_peft_config", utils.get_peft_config)
    monkeypatch.setenv("PEFT_SIEVE_TRL_CONFIG", json.dumps({"calib_dataset": "data.jsonl", "lora_alpha": 4}))
    return importlib.import_module("peft_sieve.training.trl_config")


def test_trl_sft_trains_a_sparse_adapter(tmp_path: Path) -> None:
    """The command of docs/trl.md. It starts a process of its own for the training, from settings in a file, too."""
    (words,) = (
        command
        for language, block in blocks(ROOT / "docs" / "trl.md")
        if language == "sh"
        for command in commands(block)
        if "trl" in command
    )
    (tmp_path / "sft.yaml").write_text("use_peft: true\nlora_r: 4\nmax_steps: 2\nreport_to: none\nmax_length: 32\n")
    program = words.index("--")
    with HubStandIn() as hub:
        files = {path.name: path.read_bytes() for path in TINY_OLMOE.iterdir()}
        hub.add("allenai/OLMoE-1B-7B-0924", files)
        data = "".join(json.dumps({"text": row["question"]}) + "\n" for row in questions(8))
        hub.add("me/data", {"train.jsonl": data}, repo_type="dataset")
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        with patch.dict(os.environ, environment, clear=True):
            done = finished(
                *words[2:program],
                *("--sieve", "train_router=false"),
                *words[program:],
                *("--config", "sft.yaml", "--per_device_train_batch_size", "2", "--use_cpu", "--lora_alpha", "8"),
                cwd=tmp_path,
            )
    assert done.returncode == 0, done.stderr[-3000:]
    config = SieveLoraConfig.from_pretrained(tmp_path / "out")
    assert config.peft_type == "SIEVE_LORA"
    assert (config.r, config.lora_alpha, config.train_router) == (4, 8, False)
    assert [len(ids) for ids in config.selected_experts.values()] == [8] * 6
    assert config.calibration["dataset"] == "me/data" and config.calibration["samples"] == 8
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_lora_options_keep_their_meaning_and_sieve_options_come_on_top(trl_config: Any) -> None:
    options = ModelConfig(
        use_peft=True, lora_r=8, lora_dropout=0.2, use_rslora=True, lora_target_modules=["q_proj", "v_proj"]
    )
    config = trl_config.get_peft_config(options)
    assert type(config) is SieveLoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 4, 0.2, True)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.calib_dataset == "data.jsonl" and config.task_type == "CAUSAL_LM"
    assert trl_config.get_peft_config(ModelConfig(use_peft=True)).target_modules is None


def test_sieve_options_without_an_adapter_are_refused(trl_config: Any) -> None:
    with pytest.raises(SieveError, match="--sieve .*--use_peft"):
        trl_config.get_peft_config(ModelConfig())
    with pytest.raises(SieveError, match="use_dora=True .*not supported"):
        trl_config.get_peft_config(ModelConfig(use_peft=True, use_dora=True))
