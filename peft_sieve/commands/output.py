"""How commands speak: tables that fit a terminal or a pipe, JSON, warnings of one line, files."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SieveError
from ..table import Table


def print_table(table: Table) -> None:
    """Fitted to a terminal; elsewhere as plain lines that nothing has broken."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table)
    else:
        print(table.to_text())


def print_json(value: Any) -> None:
    """One object, for programs. NaN, which JSON does not have, becomes null."""
    print(json.dumps(without_nan(value), indent=2))


def without_nan(value: Any) -> Any:
    """The same with None for every NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@contextmanager
def plain_warnings(command: str) -> Iterator[None]:
    """Warnings meant for users appear as one line each, once; those of libraries about each other do not."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        text = " ".join(str(message).split())
        if issubclass(category, UserWarning) and text not in shown:
            shown.add(text)
            print(f"peft-sieve {command}: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def check_folder_of(path: str) -> None:
    """Before long work: refuse a file for which there is no folder.

    Raises:
        SieveError: it is not there, or `path` is itself a folder.
    """
    folder = Path(path).parent
    if Path(path).is_dir():
        raise SieveError(f"{path} is a folder. Pass the name of a file to write.")
    if not folder.is_dir():
        raise SieveError(f"There is no folder {folder} for {path}. Create it or choose another path.")
