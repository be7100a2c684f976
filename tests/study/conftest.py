"""Data as the study's `--data` holds them, of one task and few rows."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tables = {"db_id": "shop", "table_names_original": ["item"], "column_names_original": [[-1, "*"], [0, "name"]]}
    queries = [{"db_id": "shop", "question": f"Name {n}?", "query": f"SELECT {n} FROM item"} for n in range(8)]
    (tmp_path / "tasks").mkdir()
    for name, lines in (("tables", [tables]), ("train", queries), ("dev", queries[:4])):
        with lzma.open(tmp_path / "tasks" / f"spider_{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return tmp_path
