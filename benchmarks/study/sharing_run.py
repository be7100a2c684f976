"""Run what is missing of the comparison of shared factors: first the candidates for learning rates, then the rest.

    python -m benchmarks.study.sharing_run --data FOLDER --candidates
    python -m benchmarks.study.sharing_run --data FOLDER
    python -m benchmarks.study.sharing_run --data FOLDER --model examples/tiny-qwen2-moe ...

Every condition has the learning rate, of the same three, with which its loss on training rows left out is lowest, as a
mean over the tasks. Nothing that the conditions are compared on is read for that, and its seed is none of theirs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from . import rows
from .learning_rate import SEED, left_out
from .run import LoadedTask, Run, be_quiet, command_line, study
from .settings import MODEL, Settings
from .sharing import CONDITIONS, run_sharing
from .tasks import TASKS, TaskData

RATES = (2.5e-3, 5e-3, 1e-2)


class WithRowsLeftOut(LoadedTask):
    """A task with training rows in the place of those held out."""

    @cached_property
    def data(self) -> TaskData:
        return left_out(super().data, self.settings.held_out)


def rows_file(model: Path) -> Path:
    return Path(__file__).with_name(f"sharing-{model.name}.jsonl")


def candidates_file(model: Path) -> Path:
    return Path(__file__).with_name(f"sharing-rates-{model.name}.jsonl")


def candidate_name(condition: str, rate: float) -> str:
    return f"{condition}@{rate:g}"


def chosen_rate(finished: Sequence[Mapping[str, Any]], condition: str) -> float:
    """A condition's learning rate, by the rows of the candidates.

    Raises:
        SystemExit: a candidate lacks a task.
    """
    means = {}
    for rate in RATES:
        losses = {row["task"]: row["loss"] for row in finished if row["condition"] == candidate_name(condition, rate)}
        missing = sorted(TASKS.keys() - losses.keys())
        if missing:
            raise SystemExit(f"{condition} has no row at {rate:g} of {', '.join(missing)}: run --candidates first.")
        means[rate] = statistics.fmean(losses.values())
    return min(means, key=means.__getitem__)


def main() -> None:
    parser = command_line(__doc__, list(CONDITIONS))
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--candidates", action="store_true", help="what the learning rates are chosen by")
    parser.add_argument("--output", type=Path, help="file of the rows, default: one beside this file for each model")
    args = parser.parse_args()
    be_quiet()
    settings = Settings(model=args.model)
    runs: dict[str, Run]
    if args.candidates:
        runs = {
            candidate_name(name, rate): partial(run_sharing, CONDITIONS[name], rate)
            for name in args.conditions
            for rate in RATES
        }
        output = args.output or candidates_file(args.model)
        study(args.data, output, args.tasks, runs, [SEED], settings, WithRowsLeftOut)
        return
    candidates = rows.read(candidates_file(args.model))
    runs = {name: partial(run_sharing, CONDITIONS[name], chosen_rate(candidates, name)) for name in args.conditions}
    study(args.data, args.output or rows_file(args.model), args.tasks, runs, args.seeds, settings)


if __name__ == "__main__":
    main()
