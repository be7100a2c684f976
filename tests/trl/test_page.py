"""The code of docs/trl.md runs as it stands, one block after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    names: dict[str, Any] = {"__name__": "trl_page"}
    exec(compile("\n".join(blocks), "docs/trl.md", "exec"), names)
    assert [entry["step"] for entry in names["logs"]] == [1, 2]
    for run in ("sft", "dpo/checkpoint-2", "dpo-after-sft/checkpoint-2", "grpo/checkpoint-2", "reward/checkpoint-2"):
        config = json.loads((tmp_path / "out" / run / "adapter_config.json").read_text())
        assert config["peft_type"] == "SIEVE_LORA", run
        assert config["calibration"]["samples"] == (32 if run in ("dpo/checkpoint-2", "reward/checkpoint-2") else 16), (
            run
        )
