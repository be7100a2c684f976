"""The code of docs/methods/dmep.md runs as it stands, and its table has every setting."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from peft_sieve import LoraMoeConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "methods" / "dmep.md").read_text()


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    names: dict[str, Any] = {"__name__": "dmep_page"}
    exec(compile("\n".join(blocks), "docs/methods/dmep.md", "exec"), names)
    assert names["pruned"] < names["full"]
    for folder in ("dmep", "dmep-sft/checkpoint-4"):
        config = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA_MOE" and len(config["kept_experts"]) == 24


def test_the_table_has_every_setting_and_its_default() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    documented = dict(
        pair
        for names, defaults in rows
        for pair in zip(names.replace("`", "").split(", "), defaults.split(", ") * len(names.split(", ")), strict=False)
    )
    own = {f.name: f.default for f in fields(LoraMoeConfig) if f.name not in {g.name for g in fields(PeftConfig)}}
    assert documented == {name: str(default) for name, default in own.items()}
