"""The study's tables, on numbers small enough to work out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.study import rows
from benchmarks.study.analysis import against_full, compare, complete_seeds, fill, losses, main_table, parts_of
from benchmarks.study.conditions import conditions
from benchmarks.study.methods_table import comparison
from benchmarks.study.settings import Settings

LABELS = {name: condition.label for name, condition in conditions(Settings()).items()}
FULL = {0: 1.50, 1: 1.60, 2: 1.70}
# Minus full: 0.01, 0.03, 0.02, of mean 0.02 and sd 0.01; and 0.001, -0.001, 0 of mean 0 and sd 0.001.
NONE, HOT = {0: 1.51, 1: 1.63, 2: 1.72}, {0: 1.501, 1: 1.599, 2: 1.70}


def row(condition: str, seed: int, loss: float) -> dict:
    fixed = {"task": "sql", "next_token": 0.5, "whole": 0.0, "trainable": 1000, "experts_per_layer": 8.0}
    return {**fixed, "untrained_loss": 5.0, "condition": condition, "seed": seed, "loss": loss}


ROWS = [row(c, s, x) for c, values in (("all", FULL), ("none", NONE), ("hot_25", HOT)) for s, x in values.items()]


def two_sided(t: float) -> float:
    """Student's t with 2 degrees of freedom has a closed form."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


def test_the_comparison_with_full_lora() -> None:
    compared = against_full(losses(ROWS, "sql"))
    assert list(compared) == ["none", "hot_25"]
    none, hot = compared["none"], compared["hot_25"]
    assert none.differences == pytest.approx((0.01, 0.03, 0.02))
    assert none.paired.mean_difference == pytest.approx(0.02)
    reach = 4.30265273 * 0.01 / math.sqrt(3)
    assert none.paired.confidence_interval == pytest.approx((0.02 - reach, 0.02 + reach))
    # Two conditions: the smaller p is doubled, the larger one stays.
    assert none.p_value == pytest.approx(2 * two_sided(0.02 / (0.01 / math.sqrt(3))))
    assert hot.p_value == pytest.approx(1.0)
    # TOST at 0.02: for `none`, the upper test has t = 0 and p = 0.5; for `hot_25`, |t| = 0.02 / (0.001 / sqrt(3)).
    assert hot.tost_p_value == pytest.approx(2 * two_sided(20 * math.sqrt(3)) / 2)
    assert none.tost_p_value == pytest.approx(0.5)
    assert (none.verdict, hot.verdict) == ("open", "within the margin")


def test_verdicts_name_the_direction() -> None:
    of_task = {"all": FULL, "none": {s: x + 0.3 + s * 0.001 for s, x in FULL.items()}}
    assert compare(of_task, [("none", "all")])["none - all"].verdict == "worse"
    assert compare(of_task, [("all", "none")])["all - none"].verdict == "better"


def test_the_main_table() -> None:
    full, hot, none = (line.split(" | ") for line in main_table(ROWS, "sql", LABELS)[2:])
    assert full == ["| all experts (full LoRA)", "8", "1,000", "1.6000 (0.1000)", "100%", "", "", "", " |"]
    assert hot[:5] == ["| hot 25%", "8", "1,000", "1.6000 (0.0995)", "100%"]
    assert hot[5][1:] == "0.0000, -0.0025 to +0.0025"  # of a mean that rounding leaves a sign
    assert hot[6:] == ["1.000", "<0.001", "within the margin |"]
    assert none[4:6] == ["0%", "+0.0200, -0.0048 to +0.0448"]


def test_the_table_of_methods() -> None:
    finished = [
        {**row(name, seed, loss), "trainable_at_start": 5000, "learning_rate": 5e-3}
        for name, values in (("hot_25", FULL), ("uniform", NONE))
        for seed, loss in values.items()
    ]
    about, _, *table = comparison(finished, {"hot_25": "hot 25%", "uniform": "uniform", "epng": "not run"})
    assert about == "6 runs: 2 methods, 1 tasks, 3 seeds."
    assert table[2:] == [
        "| hot 25% | 5,000 | 0.005 | 1.6000 |",
        "| uniform | 5,000 | 0.005 | 1.6200: -0.0048 to +0.0448, p 0.074, open |",
    ]


def test_only_complete_seeds_count() -> None:
    assert complete_seeds(ROWS) == [0, 1, 2]
    assert complete_seeds([r for r in ROWS if (r["condition"], r["seed"]) != ("none", 1)]) == [0, 2]
    with pytest.raises(SystemExit, match="1 seeds have all their rows, expected 2"):
        parts_of([r for r in ROWS if r["seed"] == 0])


def test_a_file_of_rows_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for each in ROWS[:2]:
        rows.append(path, each)
    with path.open("a") as file:
        file.write(json.dumps(ROWS[2])[:40])
    assert rows.read(path) == ROWS[:2]
    rows.drop_partial(path)
    rows.append(path, ROWS[2])
    assert rows.read(path) == ROWS[:3]
    rows.append(path, ROWS[2])
    with pytest.raises(SystemExit, match=r"line 4, repeats the run \('sql', 'all', 2\)"):
        rows.read(path)


def test_filling_replaces_only_its_own_part() -> None:
    page = "before\n<!-- main -->\nold\n<!-- end of main -->\nafter"
    assert fill(page, {"main": ["new"]}) == "before\n<!-- main -->\n\nnew\n\n<!-- end of main -->\nafter"
    with pytest.raises(SystemExit, match="needs <!-- other -->"):
        fill(page, {"other": []})
