"""Print what a saved adapter holds, without loading a model: mask, coverage, ranks, sizes, and where the mask came
from."""

from __future__ import annotations

import argparse
import json

NAME = "inspect"
HELP = "print what a saved adapter holds"
EXAMPLES = """\
  peft-sieve inspect out/adapter
  peft-sieve inspect me/adapter --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("adapter", help="path or Hub id of a saved sparse adapter")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from ..adapters.inspection import inspect_adapter

    summary = inspect_adapter(args.adapter)
    if args.json:
        print(json.dumps(summary.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console(soft_wrap=False).print(*summary.to_tables())
    return 0
