"""The code of README and docs runs as it stands; other modules run the pages that need more than that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_sieve
from tests.hub_standin import HubStandIn
from tests.models import TINY_OLMOE
from tests.pages import ROOT, blocks

# In this order: the README trains the adapter that serving.md serves.
HERE = [
    "README.md",
    "docs/serving.md",
    "docs/index.md",
    "docs/statistics.md",
    "docs/quickstart.md",
    "docs/choosing-k.md",
    "docs/shared-factors.md",
    "docs/several-adapters.md",
    "docs/architecture.md",
]
ELSEWHERE = {
    "docs/command-line.md": "tests/commands/test_page.py",
    "docs/custom-architectures.md": "tests/moe/test_custom_architectures.py",
    "docs/hub.md": "tests/test_pages.py",
    "docs/methods/dmep.md": "tests/tuners/lora_moe/test_page.py",
    "docs/methods/epng.md": "tests/tuners/epng/test_page.py",
    "docs/methods/esft.md": "tests/tuners/test_esft_and_hellora_pages.py",
    "docs/methods/hellora.md": "tests/tuners/test_esft_and_hellora_pages.py",
    "docs/methods/perft.md": "tests/tuners/perft/test_page.py",
    "docs/trl.md": "tests/trl/test_page.py",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(folder: Path, *pages: str, environment: dict[str, str] | None = None) -> None:
    """Run pages in a fresh process, in a folder that looks to them like a clone."""
    for name in ("examples", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    environment = {**(environment or os.environ | {"HF_HOME": str(folder / "hf")}), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.pages", *pages],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def test_pages_run(tmp_path: Path) -> None:
    run(tmp_path, *HERE)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SIEVE_LORA"
    assert all(len(ids) == 8 for ids in config["selected_experts"].values())
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "out" / "merged" / "config.json").exists()


def test_the_hub_page_runs(tmp_path: Path) -> None:
    rows = [{"text": f"Tom has {i} apples and buys {i + 2} more. How many apples does he have?"} for i in range(24)]
    with HubStandIn() as hub:
        hub.add("me/base", {path.name: path.read_bytes() for path in TINY_OLMOE.iterdir()})
        hub.add("me/questions", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}, repo_type="dataset")
        run(tmp_path, "docs/hub.md", environment=hub.environment(tmp_path / "home"))
        assert hub.files("me/adapter").keys() >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_left_out(page: Path) -> None:
    languages = {language for language, _ in blocks(page)}
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a fence that is indented, or not closed"
    assert languages <= {"python", "sh", "text"}
    name = str(page.relative_to(ROOT))
    if languages & {"python", "sh"} and name not in HERE:
        assert name in ELSEWHERE, "nothing runs this page"
        assert page.name in (ROOT / ELSEWHERE[name]).read_text()


def test_the_reference_has_every_public_name() -> None:
    documented = re.findall(r"^::: peft_sieve\.(?:[\w.]+\.)?(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert len(set(documented)) == len(documented)
    assert set(peft_sieve.__all__) <= set(documented)


def test_every_linked_file_exists() -> None:
    for page in (*PAGES, *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*/*.md")):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
            if target != "changelog.md":
                assert (page.parent / target).exists(), f"{page.name}: {target}"
