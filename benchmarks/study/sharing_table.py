"""The part of docs/evidence.md on shared factors, and its figure, from the rows of `sharing_run.py`.

    python -m benchmarks.study.sharing_table

What stands between `<!-- sharing -->` and `<!-- end of sharing -->` is replaced, by a section for each model with
rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import rows
from .analysis import (
    PAGE,
    REFERENCE,
    Row,
    compare,
    complete_seeds,
    fill,
    gain_kept,
    line,
    listed,
    losses,
    tested,
)
from .settings import ROOT
from .tasks import TASKS

RECIPE = "hot_25"
MODELS = {
    "tiny-olmoe": "6 layers of 32 experts of width 48, top-4, hidden size 128.",
    "tiny-qwen2-moe": "6 layers of 64 experts of width 32 and a shared expert, hidden size 128.",
}
FIGURE = ROOT / "docs" / "figures" / "sharing.png"
MEAN = "mean of the tasks"

OfTask = Mapping[str, Mapping[int, float]]  # condition -> seed -> loss


def by_task(finished: Sequence[Row]) -> dict[str, OfTask]:
    """Label of a task -> its losses; the last is their mean over the tasks, seed by seed."""
    tasks = [name for name in TASKS if any(row["task"] == name for row in finished)]
    found: dict[str, OfTask] = {TASKS[task].label: losses(finished, task) for task in tasks}
    first, *_ = found.values()
    mean = {
        name: {seed: statistics.fmean(of_task[name][seed] for of_task in found.values()) for seed in of_seed}
        for name, of_seed in first.items()
    }
    return {**found, MEAN: mean}


def sizes_table(finished: Sequence[Row], candidates: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
    """A line for each condition: its size, and what the candidates for its learning rate scored."""
    rates = sorted({row["learning_rate"] for row in candidates})
    headings = ["", "own factors, a layer", "rank", "trainable parameters", "learning rate"]
    headings += [f"left out: loss at {rate:g}" for rate in rates]
    lines = [line(headings), line(["---"] * len(headings))]
    for name, label in labels.items():
        row = next(row for row in finished if row["condition"] == name)
        cells = [label, str(row["own_experts"]), str(row["rank"]) if row["trainable_experts"] else "-"]
        cells += [f"{row['trainable']:,}", f"{row['learning_rate']:g}"]
        for rate in rates:
            of_rate = [
                c["loss"] for c in candidates if c["condition"].startswith(f"{name}@") and c["learning_rate"] == rate
            ]
            cells.append(f"{statistics.fmean(of_rate):.4f}")
        lines.append(line(cells))
    return lines


def losses_table(of_task: OfTask, labels: Mapping[str, str]) -> list[str]:
    """A line for each condition: its loss, and its differences to the recipe and to LoRA on all experts."""
    against = {
        reference: compare(of_task, [(name, reference) for name in labels if name != reference])
        for reference in (RECIPE, REFERENCE)
    }
    lines = [
        "| | loss, mean (sd) | gain kept | minus the recipe, 95% interval | p | verdict | minus full LoRA, 95% "
        "interval | p | verdict |",
        line(["---"] * 9),
    ]
    for name, label in labels.items():
        values = of_task[name].values()
        cells = [label, f"{statistics.fmean(values):.4f} ({statistics.stdev(values):.4f})", gain_kept(of_task, name)]
        for reference, compared in against.items():
            found = compared.get(f"{name} - {reference}")
            interval, p, _, verdict = tested(found) if found else ("", "", "", "")
            cells += [interval, p, verdict]
        lines.append(line(cells))
    return lines


def part_of(finished: Sequence[Row], candidates: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
    """What the page says of a model.

    Raises:
        SystemExit: fewer than two seeds are complete.
    """
    whole = whole_seeds(finished)
    seeds = sorted({row["seed"] for row in whole})
    if len(seeds) < 2:
        raise SystemExit(f"{len(seeds)} seeds have all their rows, expected 2 or more: run sharing_run on.")
    labels = {name: label for name, label in labels.items() if any(row["condition"] == name for row in whole)}
    tables = by_task(whole)
    about = (
        f"{len(whole)} runs: {len(tables) - 1} tasks, {len(labels)} conditions, {len(seeds)} seeds ({listed(seeds)})."
    )
    lines = [about, "", *sizes_table(whole, candidates, labels)]
    for task, of_task in tables.items():
        lines += ["", f"#### {task}", "", *losses_table(of_task, labels)]
    return lines


def whole_seeds(finished: Sequence[Row]) -> list[Row]:
    seeds = complete_seeds(finished)
    return [row for row in finished if row["seed"] in seeds]


def main() -> None:
    # Here, since they load torch, which the tables do without.
    from .sharing import CONDITIONS
    from .sharing_figure import draw
    from .sharing_run import candidates_file, rows_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="default: %(default)s")
    args = parser.parse_args()
    labels = {name: condition.label for name, condition in CONDITIONS.items()}
    finished = {model: rows.read(rows_file(Path(model))) for model in MODELS}
    sections: list[str] = []
    for model, of_model in finished.items():
        if of_model:
            part = part_of(of_model, rows.read(candidates_file(Path(model))), labels)
            sections += [f"### {model}", "", MODELS[model], "", *part, ""]
    args.page.write_text(fill(args.page.read_text(), {"sharing": sections[:-1]}))
    draw(
        {model: by_task(whole_seeds(of_model)) for model, of_model in finished.items() if of_model}, labels, args.figure
    )
    print(f"{args.page} and {args.figure} are written")


if __name__ == "__main__":
    main()
