"""The table of docs/methods.md, from the rows of `methods.py`.

    python -m benchmarks.study.methods_table

What stands between `<!-- comparison -->` and `<!-- end of comparison -->` is replaced.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import rows
from .analysis import Row, compare, complete_seeds, fill, line, losses, p_value
from .settings import ROOT
from .tasks import TASKS

REFERENCE = "hot_25"
PAGE = ROOT / "docs" / "methods.md"


def comparison(finished: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
    """A line for each method: parameters, and for each task the loss and its difference to the hot quarter's.

    Raises:
        SystemExit: fewer than two seeds are complete.
    """
    seeds = complete_seeds(finished)
    if len(seeds) < 2:
        raise SystemExit(f"{len(seeds)} seeds have all their rows, expected 2 or more: run the methods on")
    whole = [row for row in finished if row["seed"] in seeds]
    tasks = [task for task in TASKS if any(row["task"] == task for row in whole)]
    names = [name for name in labels if any(row["condition"] == name for row in whole)]
    others = [name for name in names if name != REFERENCE]
    compared = {task: compare(losses(whole, task), [(name, REFERENCE) for name in others]) for task in tasks}
    headings = ["method", "parameters", "learning rate", *(TASKS[task].label for task in tasks)]
    lines = [line(headings), line(["---"] * len(headings))]
    for name in names:
        runs = [row for row in whole if row["condition"] == name]
        cells = [
            labels[name],
            f"{statistics.fmean(row['trainable_at_start'] for row in runs):,.0f}",
            f"{runs[0]['learning_rate']:g}",
        ]
        for task in tasks:
            mean = statistics.fmean(losses(whole, task)[name].values())
            if name == REFERENCE:
                cells.append(f"{mean:.4f}")
                continue
            found = compared[task][f"{name} - {REFERENCE}"]
            low, high = found.paired.confidence_interval
            cells.append(f"{mean:.4f}: {low:+.4f} to {high:+.4f}, p {p_value(found.p_value)}, {found.verdict}")
        lines.append(line(cells))
    return [f"{len(whole)} runs: {len(names)} methods, {len(tasks)} tasks, {len(seeds)} seeds.", "", *lines]


def main() -> None:
    from .methods import METHODS, ROWS  # here, since they load torch, which the table needs not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    args = parser.parse_args()
    labels = {name: method.label for name, method in METHODS.items()}
    table = comparison(rows.read(args.rows), labels)
    args.page.write_text(fill(args.page.read_text(), {"comparison": table}))
    print(f"{args.page} is written")


if __name__ == "__main__":
    main()
