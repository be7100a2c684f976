"""What the benchmarks share: where a row was measured, timing in turn, percentiles, and rows written as they come."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_sieve

HERE = Path(__file__).resolve().parent


def environment() -> dict[str, Any]:
    """Versions, machine and commit; part of every row."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_sieve": importlib.metadata.version("peft-sieve"),
        "device": device_name(),
        "device_type": device(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if device() == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the package that is measured, with "+" if it was changed since.

    PYTHONPATH may name another checkout of it, to compare an earlier state.
    """
    package = Path(peft_sieve.__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=package.parent, capture_output=True, text=True, check=False).stdout

    # Results are written while others are still being measured, so they do not count as a change.
    changed = git("status", "--porcelain", "--", "peft_sieve", "benchmarks/*.py").strip()
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    """Seconds."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Run all functions in turn, round by round, so that they meet the same noise.

    Each runs once untimed before it is timed, since in training a step follows one of its own kind: what another method
    left in the caches and in the allocator can change its time by a fifth. Which one goes first rotates.

    Returns:
        Name -> seconds of each round.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            functions[name]()
            seconds[name].append(timed(functions[name]))
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> list[float]:
    """Round by round, so that what slows a whole round down cancels."""
    return [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]


def percentiles(values: Sequence[float], name: str, digits: int = 3) -> dict[str, float]:
    """`{name}_p20`, `{name}_p50` and `{name}_p80`, to so many significant digits after the first."""
    deciles = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=10, method="inclusive")
    return {f"{name}_p{10 * (i + 1)}": _rounded(deciles[i], digits + 1) for i in (1, 4, 7)}


def _rounded(value: float, significant: int) -> float:
    return 0.0 if value == 0 else round(value, significant - 1 - math.floor(math.log10(abs(value))))


class Rows:
    """Appends rows to a file of JSON lines, each with the environment, as soon as it is measured.

    Args:
        output: the file; None to write nothing.
    """

    def __init__(self, benchmark: str, output: Path | None, **common: Any) -> None:
        self.common = {"benchmark": benchmark, **common}
        self.about = environment()
        self.output = output
        print(", ".join(f"{key} {value}" for key, value in self.about.items()), flush=True)

    def write(self, row: Mapping[str, Any]) -> None:
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("a") as file:
            file.write(json.dumps({**self.common, **row, **self.about}) + "\n")


def arguments(doc: str | None, results: str, repeats: int | None) -> argparse.ArgumentParser:
    """The options all benchmarks have; a quick run writes nothing unless told where.

    Args:
        repeats: default number of rounds; None if nothing is repeated.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument("--repeats", type=positive, default=repeats, help=f"rounds to time, default {repeats}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; writes no rows")
    parser.add_argument("--output", type=Path, help=f"JSON lines to append to, default benchmarks/results/{results}")
    parser.set_defaults(results=HERE / "results" / results)
    return parser


def output_of(args: argparse.Namespace) -> Path | None:
    return args.output or (None if args.quick else args.results)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected a whole number from 1 on")
    return int(text)


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected a number from 0 to below 1")
    return value
