"""Rows of a local file: JSON, JSON lines, CSV or text, also compressed; needs no other library."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ...checks import one_line
from ...errors import SieveError, out_of_memory

# Number of rows -> positions of those to keep, ascending.
Chooser = Callable[[int], Sequence[int]]

_COMPRESSION = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")


def data_suffix(path: Path) -> str | None:
    """What kind of data a file's name says, such as `.csv` for `data.CSV.gz`; None if it is none that can be read."""
    suffix = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if suffix in _COMPRESSION else suffix
    return suffix if suffix in _SUFFIXES else None


def read_file(name: str, path: Path, choose: Chooser) -> tuple[Sequence[int], list[Any]]:
    """The chosen rows of a file that is not parquet.

    Args:
        name: of the file, for errors.
        path: where it is.
        choose: which rows.

    Returns:
        Positions and rows.

    Raises:
        SieveError: the file has another suffix, or cannot be read.
    """
    suffix = data_suffix(path)
    if suffix is None:
        advice = f"Use {', '.join(_SUFFIXES)}, all but .parquet also with {', '.join(_COMPRESSION)}."
        raise SieveError(f"The calibration file {name!r} has the suffix {path.suffix!r}. {advice}")
    try:
        if suffix == ".csv":
            return _pick(partial(_csv_records, path), choose)
        if suffix == ".txt":
            return _pick(lambda: ({"text": line} for _, line in _lines(path)), choose)
        if next((line.lstrip().startswith("[") for _, line in _lines(path)), False):
            with _open_text(path) as file:
                return _pick(partial(iter, json.load(file)), choose)
        positions, lines = _pick(partial(_lines, path), choose)
        return positions, [_parse(number, line) for number, line in lines]
    except Exception as error:
        if out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise SieveError(f"The calibration file {name!r} could not be read. {problem}.") from error


def _pick(
    items: Callable[[], Iterable[Any]], choose: Callable[[int], Sequence[int]]
) -> tuple[Sequence[int], list[Any]]:
    """Goes through `items` twice, to count and to pick: a large file is never held in memory."""
    positions = choose(sum(1 for _ in items()))
    wanted = set(positions)
    return positions, [item for position, item in enumerate(items()) if position in wanted]


def _open_text(path: Path, newline: str | None = None) -> Any:
    module = _COMPRESSION.get(path.suffix.lower())
    opener = import_module(module).open if module else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1, without their line break."""
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\n")


def _parse(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"Line {number} is not JSON ({error}), and the file is not one array of records") from error


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(2**31 - 1)  # a long document is one field
    try:
        with _open_text(path, newline="") as file:
            yield from csv.DictReader(file)
    finally:
        csv.field_size_limit(limit)
