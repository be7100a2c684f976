"""The study's runner: what it writes, when it is killed, and when it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# The runner itself, on less of everything.
TINY = """
import sys
from pathlib import Path
from functools import partial
from benchmarks.study.conditions import conditions
from benchmarks.study.run import run_condition, study
from benchmarks.study.settings import Settings

settings = Settings(steps=2, batch_size=2, held_out=3, calibration_samples=4, max_length=int(sys.argv[3]))
runs = {name: partial(run_condition, conditions(settings)[name]) for name in ("all", "hot_25")}
study(Path(sys.argv[1]), Path(sys.argv[2]), ["sql"], runs, [0], settings)
"""


def start(data: Path, output: Path, max_length: int = 96) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TINY, str(data), str(output), str(max_length)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def finish(process: subprocess.Popen[str]) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def results(path: Path) -> list[dict[str, Any]]:
    """The rows without what says when they were made."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "date", "commit")}
        for line in path.read_text().splitlines()
    ]


def test_a_killed_study_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    undisturbed = start(data, tmp_path / "undisturbed.jsonl")
    killed, output = start(data, tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl"
    while killed.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    finish(undisturbed)
    expected = results(tmp_path / "undisturbed.jsonl")
    assert [(row["task"], row["condition"], row["seed"]) for row in expected] == [
        ("sql", "all", 0),
        ("sql", "hot_25", 0),
    ]
    assert expected[0]["loss"] != expected[1]["loss"]

    first = output.read_text().splitlines()[0]
    output.write_text(first + '\n{"task": "sql", "condi')  # as if it had been killed in the middle of a write
    said = finish(start(data, output))
    assert said.count("seed 0") == 1, "only the run that was missing"
    assert output.read_text().splitlines()[0] == first
    assert results(output) == expected

    refused = start(data, output, max_length=95)
    assert "rows of other settings" in refused.communicate()[0]
    assert refused.returncode != 0
    assert results(output) == expected
