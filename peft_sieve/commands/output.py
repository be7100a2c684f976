"""How commands speak: tables that fit a terminal or a pipe, JSON, warnings of one line, files."""

from __future__ import annotations

import json
import math
import os
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
    if Path(path).is_dir() or not folder.is_dir():
        what = "is a folder" if Path(path).is_dir() else f"would lie in {folder}, which is no folder"
        raise SieveError(f"{path} {what}, expected the name of a file to write in a folder that exists: pass one")


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        SieveError: nothing can be written there.
    """
    check_folder_of(path)
    scratch = f"{path}.{os.getpid()}.tmp"
    try:
        Path(scratch).write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        Path(scratch).unlink(missing_ok=True)
        raise SieveError(
            f"could not write {path} ({error.strerror or error}), expected a file in a writable folder: choose another"
        ) from error
