"""The README's code runs as it stands, and after it that of pages that go on from there, in a folder with the examples.

The other pages with code have tests of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_python_block_runs(tmp_path: Path) -> None:
    pages = (ROOT / "README.md", ROOT / "docs" / "serving.md", ROOT / "docs" / "statistics.md")
    blocks = [
        block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]
    assert len(blocks) >= 5
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SIEVE_LORA"
    assert all(len(ids) == 8 for ids in config["selected_experts"].values())
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_every_linked_file_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
