"""The tasks: prompts with completions, to train on and held out."""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from .settings import Settings

Pair = tuple[str, str]  # prompt and completion


@dataclass(frozen=True)
class Task:
    """Attributes:
    label: in tables and figures.
    pairs: (folder of the data, held out or not) -> prompts with completions.
    """

    name: str
    label: str
    pairs: Callable[[Path, bool], Iterator[Pair]]


@dataclass(frozen=True)
class TaskData:
    """Rows with `prompt` and `completion`, none longer than the settings allow.

    Attributes:
        train: all there are.
        held_out: a sample, the same in every run.
        calibration: a sample of `train`, the same in every run.
    """

    train: Dataset
    held_out: Dataset
    calibration: Dataset


def load(task: Task, folder: Path, tokenizer: Any, settings: Settings) -> TaskData:
    train, held_out = (_short(task.pairs(folder, part), tokenizer, settings.max_length) for part in (False, True))
    return TaskData(
        train=_dataset(train),
        held_out=_dataset(_sample(held_out, settings.held_out, f"{task.name}:held out")),
        calibration=_dataset(_sample(train, settings.calibration_samples, f"{task.name}:calibration")),
    )


def _short(pairs: Iterator[Pair], tokenizer: Any, max_length: int) -> list[Pair]:
    kept = [(prompt, f" {completion.strip()}{tokenizer.eos_token}") for prompt, completion in pairs]
    lengths = [len(ids) for ids in tokenizer([p + c for p, c in kept], verbose=False)["input_ids"]]
    return [pair for pair, length in zip(kept, lengths, strict=True) if length <= max_length]


def _sample(pairs: list[Pair], size: int, seed: str) -> list[Pair]:
    return random.Random(seed).sample(pairs, min(size, len(pairs)))


def _dataset(pairs: list[Pair]) -> Dataset:
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise SystemExit(f"{path} is not there: benchmarks/study/README.md says which files --data must hold.")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _sql(folder: Path, held_out: bool) -> Iterator[Pair]:
    """Spider; the databases of its development split are in no training row."""
    schemas = {row["db_id"]: _schema(row) for row in _read(folder / "tasks" / "spider_tables.jsonl.xz")}
    for row in _read(folder / "tasks" / f"spider_{'dev' if held_out else 'train'}.jsonl.xz"):
        yield f"Tables: {schemas[row['db_id']]}\nQuestion: {row['question']}\nSQL:", row["query"]


def _schema(database: dict[str, Any]) -> str:
    columns: list[list[str]] = [[] for _ in database["table_names_original"]]
    for table, name in database["column_names_original"]:
        if table >= 0:
            columns[table].append(name)
    tables = zip(database["table_names_original"], columns, strict=True)
    return "; ".join(f"{table}({', '.join(names)})" for table, names in tables)


def _arithmetic(folder: Path, held_out: bool) -> Iterator[Pair]:
    """GSM8K, with the equations of the solution in the place of its sentences, which the model has seen before."""
    for row in _read(folder / "tasks" / f"gsm8k_{'test' if held_out else 'train'}.jsonl.xz"):
        equations = re.findall(r"<<(.*?)>>", row["answer"])
        result = row["answer"].rpartition("####")[2].strip()
        yield f"Question: {row['question']}\nEquations:", "; ".join([*equations, f"answer {result}"])


def _commonsense(folder: Path, held_out: bool) -> Iterator[Pair]:
    """HellaSwag: which of four endings is right, to be written out; the model has seen right endings alone before."""
    for row in _read(folder / ("tasks/hellaswag_val.jsonl.xz" if held_out else "text/hellaswag_train.jsonl.xz")):
        endings = [ending.strip() for ending in row["c"]]
        listed = "".join(f"\n{letter}: {ending}" for letter, ending in zip("ABCD", endings, strict=True))
        yield f"Situation: {row['q']}{listed}\nRight:", f"{'ABCD'[row['g']]}: {endings[row['g']]}"


TASKS = {
    task.name: task
    for task in (
        Task("sql", "text-to-SQL (Spider)", _sql),
        Task("arithmetic", "word problems (GSM8K)", _arithmetic),
        Task("commonsense", "commonsense (HellaSwag)", _commonsense),
    )
}
