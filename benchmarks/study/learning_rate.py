"""Which learning rate the study uses: the one with which LoRA on all experts does best on training rows left out.

    python -m benchmarks.study.learning_rate --data FOLDER
    python -m benchmarks.study.learning_rate --data FOLDER --condition hot_25   # would another one suit it better?
    python -m benchmarks.study.learning_rate --data FOLDER --method epng        # of methods.py

Nothing that the study evaluates on is read here, and the seed is none of the study's.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import warnings
from pathlib import Path

from examples.quickstart import MODEL  # first: it chooses the CPU, one thread and no network

# isort: split
from datasets import disable_progress_bars
from transformers import AutoTokenizer

from .conditions import conditions
from .methods import METHODS, run_method
from .run import LoadedTask, run_condition
from .settings import Settings
from .tasks import TASKS, TaskData

RATES = (2e-3, 5e-3, 1e-2)
SEED = 1000


def left_out(data: TaskData, size: int) -> TaskData:
    """Training rows in the place of the held-out ones, and the rest of them to train on."""
    order = random.Random(SEED).sample(range(len(data.train)), len(data.train))
    return dataclasses.replace(data, held_out=data.train.select(order[:size]), train=data.train.select(order[size:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    names = list(conditions(Settings()))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--condition", choices=names, default="all", metavar="NAME", help=", ".join(names))
    what.add_argument("--method", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="RATE", help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about each other, nothing to act on
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for task in (TASKS[name] for name in args.tasks):
        for rate in args.rates:
            at = LoadedTask(task, args.data, dataclasses.replace(Settings(), learning_rate=rate), tokenizer)
            at.data = left_out(at.data, at.settings.held_out)
            if args.method:
                row = run_method(dataclasses.replace(METHODS[args.method], learning_rate=rate), at, SEED)
            else:
                row = run_condition(conditions(at.settings)[args.condition], at, SEED)
            what_ran = args.method or args.condition
            print(f"{what_ran:12} {task.name:12} {rate:g}   loss {row['loss']:.4f}   {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
