"""The code of docs/methods/perft.md runs as it stands, its tables have every setting and the sizes as they are."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, get_peft_model

from peft_sieve import PerftConfig
from peft_sieve.tuners.common.config import RUNTIME_ONLY, SelectionConfig
from tests.models import tiny_model

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "methods" / "perft.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "perft_page"}
    exec(compile("\n".join(blocks), "docs/methods/perft.md", "exec"), names)
    assert {len(ids) for ids in names["hot"].values()} == {8} and names["model"].auxiliary_loss
    for folder, variant in (("perft-r", "R"), ("perft-e/checkpoint-2", "E")):
        written = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
        assert (written["peft_type"], written["variant"]) == ("PERFT", variant)


def test_the_table_has_every_setting_and_its_default() -> None:
    settings = PAGE[PAGE.index("## Settings") : PAGE.index("## What holds")]
    documented: dict[str, str] = {}
    for names, defaults in re.findall(r"^\| (`.*?) \| (.*?) \|", settings, flags=re.MULTILINE):
        several = names.replace("`", "").split(", ")
        values = defaults.split(", ") if ", " in defaults else [defaults] * len(several)
        documented |= dict(zip(several, values, strict=True))
    elsewhere = {field.name for field in fields(PeftConfig)} | {field.name for field in fields(SelectionConfig)}
    elsewhere -= {"selected_experts", "calibration", "expert_shapes"}
    own = {f.name: str(f.default) for f in fields(PerftConfig) if f.name not in elsewhere}
    assert documented == own
    assert not set(RUNTIME_ONLY) & set(own)


@pytest.mark.parametrize("form", ["lora", "bottleneck"])
def test_the_sizes_of_the_first_table(form: str) -> None:
    rows = dict(re.findall(r'^\| `"([REDS])"`.*\| ([^|]+) \|$', PAGE, flags=re.MULTILINE))
    counts = {
        "R": (lambda n, r, d: 2 * n * r * d + n * d, "2Nrd + Nd"),
        "E": (lambda n, r, d: 2 * 8 * r * d, "2Erd, or 2Hrd for H selected experts"),
        "D": (lambda n, r, d: 2 * n * r * d, "2Nrd"),
        "S": (lambda n, r, d: 2 * r * d, "2rd"),
    }
    for variant, (count, text) in counts.items():
        settings = {"num_adapters": 5} if variant in "RD" else {}
        model = get_peft_model(tiny_model("olmoe"), PerftConfig(variant=variant, form=form, r=3, **settings))
        assert rows[variant] == text
        assert model.get_nb_trainable_parameters()[0] == 2 * count(5, 3, 32)  # two blocks
