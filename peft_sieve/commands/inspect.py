"""Print what a saved adapter holds, without loading a model: mask, coverage, ranks, sizes, and where the mask came
from."""

from __future__ import annotations

import argparse

from .options import add_json
from .output import print_json

NAME = "inspect"
HELP = "print what a saved adapter holds"
EXAMPLES = """\
  peft-sieve inspect out/adapter
  peft-sieve inspect me/adapter --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("adapter", help="path or Hub id of a saved sparse adapter")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from ..adapters.inspection import inspect_adapter

    summary = inspect_adapter(args.adapter)
    if args.json:
        print_json(summary.to_dict())
    else:
        from rich.console import Console

        Console(soft_wrap=False).print(*summary.to_tables())
    return 0
