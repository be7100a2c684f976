"""What docs/command-line.md says runs as it stands, and its pictures are those that its code draws."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_sieve.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "command-line.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "text", "sh", "sh", "sh", "python", "sh", "python"]
    for folder in ("examples", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    printed = ""
    for language, block in blocks:
        if language == "text":
            assert printed == block
        elif language == "python":
            exec(compile(block, str(PAGE), "exec"), {"__name__": "command_line_page"})
        else:
            for line in block.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line)
                assert program == "peft-sieve"
                assert main(words) == 0, line
            printed = capsys.readouterr().out
    shown = re.findall(r"!\[[^]]*\]\(figures/([^)]*)\)", PAGE.read_text())
    assert len(shown) == 5
    for name in shown:
        drawn, kept = (
            np.asarray(Image.open(path).convert("L"), float) for path in (f"out/{name}", PAGE.parent / "figures" / name)
        )
        # Another release of matplotlib may smooth its lines otherwise.
        assert drawn.shape == kept.shape
        assert np.abs(drawn - kept).mean() < 3, name


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE))
    listed = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert {word for cell in listed for word in re.findall(r"`(\w+)", cell)} == commands
