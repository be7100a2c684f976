"""Run what is missing of the study: every task in every condition with every seed, one row each.

    python -m benchmarks.study.run --data FOLDER --seeds 0-3

Runs that have a row are skipped, so it can be stopped and started again at any time. All conditions of all tasks come
before the next seed. README.md beside this file says what FOLDER holds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from examples import quickstart  # first: it chooses the CPU, one thread and no network

# isort: split
from datasets import disable_progress_bars
from transformers import AutoTokenizer

from benchmarks.common import environment
from peft_sieve import RoutingProfile, profile_routing

from . import rows
from .conditions import Condition, conditions
from .settings import Settings
from .tasks import TASKS, Task, TaskData, load
from .training import base_model, run

ROWS = Path(__file__).with_name("rows.jsonl")


class LoadedTask:
    """A task's data, its routing profile and what the untrained model scores, each made when first needed."""

    def __init__(self, task: Task, folder: Path, settings: Settings, tokenizer: Any) -> None:
        self.task, self.folder, self.settings, self.tokenizer = task, folder, settings, tokenizer

    @cached_property
    def data(self) -> TaskData:
        return load(self.task, self.folder, self.tokenizer, self.settings)

    @cached_property
    def profile(self) -> RoutingProfile:
        model = base_model(self.settings)
        return profile_routing(model, self.data.calibration, tokenizer=self.tokenizer, progress=False)

    @cached_property
    def untrained(self) -> dict[str, float]:
        loss, next_token, _ = quickstart.measure(base_model(self.settings), self.tokenizer, self.data.held_out)
        return {"untrained_loss": loss, "untrained_next_token": next_token}


Run = Callable[[LoadedTask, int], dict[str, Any]]  # (task, seed) -> what it scored


def study(
    folder: Path,
    output: Path,
    tasks: Sequence[str],
    runs: Mapping[str, Run],
    seeds: Sequence[int],
    settings: Settings,
    load_task: type[LoadedTask] = LoadedTask,
) -> None:
    """Append a row for each run that has none.

    Args:
        runs: name in the rows -> what is done.
        load_task: what a run gets of its task.

    Raises:
        SystemExit: the rows there are of other settings, or data are missing.
    """
    rows.drop_partial(output)
    finished = rows.read(output)
    # A row without a setting is older than that setting, and had its default.
    if any({**Settings().as_row(), **row["settings"]} != settings.as_row() for row in finished):
        raise SystemExit(f"{output} has rows of other settings than {settings}: name another file with --output.")
    done = {rows.key(row) for row in finished}
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    loaded = {name: load_task(TASKS[name], folder, settings, tokenizer) for name in tasks}
    about = environment()
    for seed in seeds:
        for name, score in runs.items():
            for task in tasks:
                if (task, name, seed) in done:
                    continue
                at = loaded[task]
                row = {"task": task, "condition": name, "seed": seed, **score(at, seed), **at.untrained}
                rows.append(output, {**row, "settings": settings.as_row(), **about})
                print(f"seed {seed}  {task:12} {name:20} loss {row['loss']:.4f}   {row['seconds']} s", flush=True)


def run_condition(condition: Condition, at: LoadedTask, seed: int) -> dict[str, Any]:
    return run(at.data, at.profile, condition, seed, at.tokenizer, at.settings)


def seed_range(text: str) -> list[int]:
    """ "0-3" or "5" """
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected one seed or a range such as 0-3")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    every = {name: partial(run_condition, condition) for name, condition in conditions(Settings()).items()}
    run_from_command_line(__doc__, every, ROWS)


def run_from_command_line(description: str | None, every: Mapping[str, Run], rows_file: Path) -> None:
    """Parse the command line, which may name some of the runs, and do them."""
    parser = command_line(description, list(every))
    parser.add_argument("--output", type=Path, default=rows_file, help="file of the rows, default: %(default)s")
    args = parser.parse_args()
    be_quiet()
    study(args.data, args.output, args.tasks, {name: every[name] for name in args.conditions}, args.seeds, Settings())


def command_line(description: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """What says which of the runs to do; `names` are those of the conditions."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--seeds", type=seed_range, default=seed_range("0-7"), metavar="FIRST-LAST", help="default: 0-7"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--conditions", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    return parser


def be_quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about each other, nothing to act on
    disable_progress_bars()


if __name__ == "__main__":
    main()
