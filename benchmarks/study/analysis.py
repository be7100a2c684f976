"""Tables and figure of docs/evidence.md from the rows.

    python -m benchmarks.study.analysis

The page's own sentences stay; what stands between `<!-- NAME -->` and `<!-- end of NAME -->` is replaced.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_sieve import PairedEquivalence, holm_correction, paired_equivalence

from . import rows
from .conditions import conditions
from .settings import ROOT, Settings
from .tasks import TASKS

Row = Mapping[str, Any]

MARGIN = 0.02  # nats per token of the answer; fixed before the first run
REFERENCE, NO_EXPERT = "all", "none"
# Candidate and reference of the questions that full LoRA is no part of.
QUESTIONS = (
    ("hot_25", "random_25"),
    ("hot_25", NO_EXPERT),
    ("greedy_25", "hot_25"),
    ("mass_25", "hot_25"),
    ("hot_25_cold_25", "hot_25"),
    ("hot_25_cold_25", "hot_50"),
    ("step_25", "hot_25"),
)
HOTTEST = ("hot_6", "hot_12", "hot_25", "hot_50")
PAGE, FIGURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "figures" / "evidence.png"


@dataclass(frozen=True)
class Comparison:
    """Two conditions on one task, paired by seed; losses, so below 0 the candidate is better.

    Attributes:
        p_value, tost_p_value: Holm's correction over the comparisons of the same table and task included.
    """

    candidate: str
    reference: str
    differences: tuple[float, ...]
    paired: PairedEquivalence
    p_value: float
    tost_p_value: float

    @property
    def verdict(self) -> str:
        found = []
        if self.p_value < 0.05:
            found.append("better" if self.paired.mean_difference < 0 else "worse")
        if self.tost_p_value < 0.05:
            found.append("within the margin")
        return ", ".join(found) or "open"


def complete_seeds(finished: Sequence[Row]) -> list[int]:
    """Seeds with a row for every task and condition that any row names."""
    wanted = {(row["task"], row["condition"]) for row in finished}
    seeds: dict[int, set[tuple[str, str]]] = {}
    for row in finished:
        seeds.setdefault(row["seed"], set()).add((row["task"], row["condition"]))
    return sorted(seed for seed, there in seeds.items() if there == wanted)


def losses(finished: Sequence[Row], task: str) -> dict[str, dict[int, float]]:
    """Condition -> seed -> loss."""
    found: dict[str, dict[int, float]] = {}
    for row in finished:
        if row["task"] == task:
            found.setdefault(row["condition"], {})[row["seed"]] = row["loss"]
    return found


def compare(of_task: Mapping[str, Mapping[int, float]], pairs: Iterable[tuple[str, str]]) -> dict[str, Comparison]:
    """Each pair of candidate and reference tested, and all of them corrected together.

    Returns:
        "candidate - reference" -> the comparison.
    """
    pairs = {f"{candidate} - {reference}": (candidate, reference) for candidate, reference in pairs}
    paired = {
        name: paired_equivalence(of_task[reference], of_task[candidate], margin=MARGIN, bounds=None)
        for name, (candidate, reference) in pairs.items()
    }
    p_values = holm_correction({name: result.p_value for name, result in paired.items()})
    tost_p_values = holm_correction({name: result.tost_p_value for name, result in paired.items()})
    compared = {}
    for name, (candidate, reference) in pairs.items():
        first, second = of_task[reference], of_task[candidate]
        differences = tuple(second[seed] - first[seed] for seed in sorted(first))
        compared[name] = Comparison(
            candidate, reference, differences, paired[name], p_values[name], tost_p_values[name]
        )
    return compared


def against_full(of_task: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
    """Condition -> its comparison with LoRA on all experts."""
    compared = compare(of_task, [(name, REFERENCE) for name in of_task if name != REFERENCE])
    return {comparison.candidate: comparison for comparison in compared.values()}


# --- tables ---------------------------------------------------------------------------------------------------------


def main_table(finished: Sequence[Row], task: str, labels: Mapping[str, str]) -> list[str]:
    """A line for each condition. "Gain kept": of what training all experts gains over training none."""
    lines = [
        "| experts trained | a layer | trainable parameters | loss, mean (sd) | gain kept | minus full LoRA, "
        "95% interval | p | TOST p | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    of_task = losses(finished, task)
    compared = against_full(of_task)
    for name in labels:
        if name not in of_task:
            continue
        runs = [row for row in finished if row["task"] == task and row["condition"] == name]
        cells = [
            labels[name],
            _plain(mean_of(runs, "experts_per_layer")),
            f"{mean_of(runs, 'trainable'):,.0f}",
            f"{mean_of(runs, 'loss'):.4f} ({statistics.stdev(of_task[name].values()):.4f})",
            gain_kept(of_task, name),
        ]
        cells += tested(compared[name]) if name in compared else ["", "", "", ""]
        lines.append(line(cells))
    return lines


def questions_table(finished: Sequence[Row], tasks: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    lines = [
        "| task | difference | mean, 95% interval | p | TOST p | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        for comparison in compare(losses(finished, task), QUESTIONS).values():
            named = f"{labels[comparison.candidate]} minus {labels[comparison.reference]}"
            lines.append(line([TASKS[task].label, named, *tested(comparison)]))
    return lines


def number_table(finished: Sequence[Row], tasks: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """The hottest experts by their number: their share of the tokens, and of what all experts gain."""
    headings = [f"{TASKS[task].label}: {what}" for task in tasks for what in ("tokens", "gain kept")]
    lines = [line(["experts trained", *headings]), line(["---"] * (1 + len(headings)))]
    for name in HOTTEST:
        cells = [labels[name]]
        for task in tasks:
            runs = [row for row in finished if row["task"] == task and row["condition"] == name]
            if runs:
                cells += [f"{mean_of(runs, 'coverage'):.0%}", gain_kept(losses(finished, task), name)]
        if len(cells) > 1:
            lines.append(line(cells))
    return lines


def untrained_table(finished: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """What there was to learn, and how far exact match tells anything."""
    lines = [
        "| task | untrained | no expert | all experts | whole answer right, all experts |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        of_task = [row for row in finished if row["task"] == task]
        none, full = ([row for row in of_task if row["condition"] == name] for name in (NO_EXPERT, REFERENCE))
        values = [mean_of(of_task, "untrained_loss"), mean_of(none, "loss"), mean_of(full, "loss")]
        cells = [TASKS[task].label, *(f"{value:.3f}" for value in values), f"{mean_of(full, 'whole'):.1%}"]
        lines.append(line(cells))
    return lines


def tested(comparison: Comparison) -> list[str]:
    low, high = comparison.paired.confidence_interval
    interval = f"{comparison.paired.mean_difference:+.4f}, {low:+.4f} to {high:+.4f}"
    return [interval, p_value(comparison.p_value), p_value(comparison.tost_p_value), comparison.verdict]


def gain_kept(of_task: Mapping[str, Mapping[int, float]], name: str) -> str:
    """Share of what training all experts gains over training none."""
    if NO_EXPERT not in of_task:
        return ""
    none, full, this = (statistics.fmean(of_task[each].values()) for each in (NO_EXPERT, REFERENCE, name))
    return f"{(none - this) / (none - full):.0%}"


def p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def mean_of(runs: Sequence[Row], field: str) -> float:
    return statistics.fmean(row[field] for row in runs)


def _plain(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- page -----------------------------------------------------------------------------------------------------------


def fill(page: str, parts: Mapping[str, Sequence[str]]) -> str:
    """The page with the part of each name replaced.

    Raises:
        SystemExit: the page has no place of that name.
    """
    for name, lines in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", flags=re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"the page needs {start} and {end} once, around the place of that part: add them")
        body = "\n".join([start, "", *lines, "", end])
        page = pattern.sub(lambda _, body=body: body, page)
    return page


def parts_of(finished: Sequence[Row]) -> dict[str, list[str]]:
    """The generated parts of the page.

    Raises:
        SystemExit: fewer than two seeds are complete.
    """
    seeds = complete_seeds(finished)
    if len(seeds) < 2:
        raise SystemExit(f"{len(seeds)} seeds have all their rows, expected 2 or more: run the study on")
    whole = [row for row in finished if row["seed"] in seeds]
    labels = {name: condition.label for name, condition in conditions(Settings()).items()}
    tasks = [name for name in TASKS if any(row["task"] == name for row in whole)]
    main: list[str] = []
    for task in tasks:
        main += [f"### {TASKS[task].label}", "", *main_table(whole, task, labels), ""]
    about = f"{len(whole)} runs: {len(tasks)} tasks, {len(labels)} conditions, {len(seeds)} seeds ({listed(seeds)})."
    return {
        "runs": [about],
        "untrained": untrained_table(whole, tasks),
        "main": main[:-1],
        "number": number_table(whole, tasks, labels),
        "questions": questions_table(whole, tasks, labels),
    }


def listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("rows.jsonl"))
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="default: %(default)s")
    args = parser.parse_args()
    finished = rows.read(args.rows)
    args.page.write_text(fill(args.page.read_text(), parts_of(finished)))
    from .figure import draw  # here, since the tables need no matplotlib

    seeds = complete_seeds(finished)
    draw([row for row in finished if row["seed"] in seeds], args.figure)
    print(f"{args.page} and {args.figure} are written, from seeds {listed(seeds)}")


if __name__ == "__main__":
    main()
