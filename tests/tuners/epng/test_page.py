"""The code of docs/methods/epng.md runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "methods" / "epng.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    names: dict[str, Any] = {"__name__": "epng_page"}
    exec(compile("\n".join(blocks), "docs/methods/epng.md", "exec"), names)
    assert [entry.step for entry in names["model"].ledger()] == [2, 4, 6]
    for run in ("epng", "sft/checkpoint-4"):
        config = json.loads((tmp_path / "out" / run / "adapter_config.json").read_text())
        assert config["peft_type"] == "SIEVE_EPNG" and config["ledger"], run
