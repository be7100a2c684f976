"""The file of rows: one JSON object a line, one line a finished run, appended whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RunKey = tuple[str, str, int]  # task, condition, seed


def key(row: Mapping[str, Any]) -> RunKey:
    return row["task"], row["condition"], row["seed"]


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows, each run once; what follows the last line end was cut off while it was written, and is no row.

    Raises:
        SystemExit: a line is no row, or a run is there twice.
    """
    if not path.exists():
        return []
    rows: dict[RunKey, dict[str, Any]] = {}
    for number, line in enumerate(_whole_lines(path.read_bytes()).decode().splitlines(), 1):
        try:
            row = json.loads(line)
            run = key(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}, is no row of the study ({error!r}): remove it") from error
        if run in rows:
            raise SystemExit(f"{path}, line {number}, repeats the run {run}: remove one of the two")
        rows[run] = row
    return list(rows.values())


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row in one write, and have it on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())
        os.fsync(file.fileno())


def drop_partial(path: Path) -> None:
    """Remove what a write that was cut off has left at the end."""
    if path.exists():
        os.truncate(path, len(_whole_lines(path.read_bytes())))


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
