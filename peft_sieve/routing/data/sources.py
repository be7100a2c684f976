"""Where calibration data come from: files, the Hub, `datasets` objects, Python sequences and iterables.

A source gives the rows that calibration uses and no more: which ones is decided before they are read.
"""

import csv
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ...errors import SieveError
from .rows import ROW_COLUMNS, fits_a_form

ACCEPTED = (
    "a Hub id or a local file (str), a datasets.Dataset, a list of str or dicts, or an iterable of model-ready batches"
)
STREAM_BUFFER = 1_000  # rows of a stream among which the samples are drawn, at least

_NOTHING = object()
_COMPRESSION = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2"}
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
_SUFFIXES_TEXT = f"{', '.join(_FILE_SUFFIXES)} (all but .parquet also with {', '.join(_COMPRESSION)})"


@dataclass(frozen=True)
class Rows:
    """The chosen rows, each with its position in the data."""

    name: str
    positions: Sequence[int]
    rows: Sequence[Any]


@dataclass(frozen=True)
class ModelBatches:
    """An iterable whose items are ready for the model; unread so far."""

    name: str
    batches: Iterable[Any]


def read_source(
    data: Any, *, split: str, max_samples: int, seed: int, all_columns: bool = False
) -> Rows | ModelBatches:
    """Reads the rows that calibration uses.

    Args:
        data: `ACCEPTED`.
        split: which split, where the data have several: on the Hub, in a folder or in a `DatasetDict`.
        max_samples: rows read at most.
        seed: which rows, where there are more.
        all_columns: read every column of a `datasets.Dataset`, not only those that rows are known by.

    Raises:
        SieveError: the data cannot be found or read, have no such split, no rows or no usable type.
    """
    if isinstance(data, (str, os.PathLike)):
        source = _read_named(os.fspath(data), split, max_samples, seed, all_columns)
    else:
        source = _read_object(data, None, split, max_samples, seed, all_columns)
    if isinstance(source, Rows) and not source.rows:
        raise SieveError(f"the calibration data set {source.name!r} is empty; expected at least one row.")
    return source


def choose(count: int, max_samples: int, seed: int) -> Sequence[int]:
    """Positions of at most `max_samples` of `count` items, ascending; the same for a seed."""
    if count <= max_samples:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), max_samples))


def is_model_batch(item: Any) -> bool:
    """Whether `item` is a mapping with 2-D `input_ids`, shape `(batch, seq)`."""
    if not isinstance(item, Mapping):
        return False
    input_ids = item.get("input_ids")
    return isinstance(input_ids, (torch.Tensor, np.ndarray)) and input_ids.ndim == 2


# --- objects ---------------------------------------------------------------------------------------------------------


def _read_object(
    data: Any, name: str | None, split: str, max_samples: int, seed: int, all_columns: bool
) -> Rows | ModelBatches:
    type_name = type(data).__name__
    hf = sys.modules.get("datasets")  # an object of it can exist only if it has been imported
    if hf is not None and isinstance(data, (hf.DatasetDict, hf.IterableDatasetDict)):
        if split not in data:
            raise _no_split(name or type_name, split, list(data))
        return _read_object(data[split], name, split, max_samples, seed, all_columns)
    if hf is not None and isinstance(data, hf.Dataset):
        return _read_dataset(data, name, max_samples, seed, all_columns)
    if hf is not None and isinstance(data, hf.IterableDataset):
        shuffled = data.with_format(None).shuffle(seed=seed % 2**32, buffer_size=_buffer(max_samples))
        rows = list(shuffled.take(max_samples))
        return Rows(name or _dataset_name(data), range(len(rows)), rows)
    if is_model_batch(data):
        return ModelBatches(type_name, [data])
    if _is_indexable(data):
        if len(data) and is_model_batch(data[0]):
            return ModelBatches(type_name, data)
        positions = choose(len(data), max_samples, seed)
        return Rows(name or type_name, positions, [data[i] for i in positions])
    if isinstance(data, Iterable) and not isinstance(data, (Mapping, bytes, bytearray, memoryview)):
        return _read_iterable(data, max_samples, seed)
    raise SieveError(f"the calibration data are of type {type_name}; expected {ACCEPTED}.")


def _is_indexable(data: Any) -> bool:
    if isinstance(data, torch.utils.data.Dataset):
        return hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray, memoryview))


def _read_iterable(data: Iterable[Any], max_samples: int, seed: int) -> Rows | ModelBatches:
    type_name = type(data).__name__
    items = iter(data)
    first = next(items, _NOTHING)
    if first is _NOTHING:
        raise SieveError(f"the calibration data, a {type_name}, yield nothing; pass data that have not been consumed.")
    if is_model_batch(first):
        return ModelBatches(type_name, chain([first], items))
    if not isinstance(data, Iterator):
        # Iterating a set or a DataFrame gives str too: in no order, or the names of columns.
        raise SieveError(
            f"the calibration data, a {type_name}, yield items of type {type(first).__name__}; expected model-ready "
            "batches (dicts with 2-D `input_ids`): pass rows as a list or a datasets.Dataset."
        )
    seen = [first, *islice(items, _buffer(max_samples) - 1)]
    positions = choose(len(seen), max_samples, seed)
    return Rows(type_name, positions, [seen[i] for i in positions])


def _buffer(max_samples: int) -> int:
    return max(STREAM_BUFFER, 2 * max_samples)


def _read_dataset(data: Any, name: str | None, max_samples: int, seed: int, all_columns: bool) -> Rows:
    positions = choose(len(data), max_samples, seed)
    chosen = data.select(positions)
    if chosen.format["type"] != "custom":  # a transform makes the rows; any other format only dresses them
        chosen = chosen.with_format(None, columns=chosen.format["columns"])
        columns = chosen.format["columns"]
        if fits_a_form(columns) and not all_columns:  # so that no image or sound is decoded in vain
            chosen = chosen.select_columns([column for column in columns if column in ROW_COLUMNS])
    return Rows(name or _dataset_name(data), positions, list(chosen))


def _dataset_name(data: Any) -> str:
    name = getattr(data.info, "dataset_name", None)
    # Built from a file or a generator, a data set bears the name of the builder.
    return name if name and name not in ("json", "csv", "parquet", "text", "generator") else type(data).__name__


# --- names: local files and folders, the Hub -------------------------------------------------------------------------


def _read_named(name: str, split: str, max_samples: int, seed: int, all_columns: bool) -> Rows | ModelBatches:
    path = Path(name).expanduser()
    if not name.strip():
        raise SieveError(f"the calibration data set is named by an empty str; expected {ACCEPTED}.")
    if path.is_file():
        return _read_file(name, path, max_samples, seed, all_columns)
    if not path.exists() and _looks_like_path(name):
        raise SieveError(f"the calibration file {name!r} does not exist.")
    return _read_object(_load(name, path, split), name, split, max_samples, seed, all_columns)


def _looks_like_path(name: str) -> bool:
    """Whether `name` can only be a path: a Hub id is `name` or `org/name`."""
    return (
        name.startswith((".", "~"))
        or os.path.isabs(name)
        or name.count("/") > 1
        or (os.sep != "/" and os.sep in name)
        or _data_suffix(Path(name)) in _FILE_SUFFIXES
    )


def _data_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSION else suffix


def _load(name: str, path: Path, split: str) -> Any:
    hf = _import_datasets(f"reading the data set {name!r}")
    saved = [entry for entry in ("state.json", "dataset_dict.json") if (path / entry).is_file()]
    where = str(path) if path.exists() else name
    call = f"load_from_disk({name!r})" if saved else f"load_dataset({name!r}, split={split!r})"
    try:
        return hf.load_from_disk(where) if saved else hf.load_dataset(where, split=split)
    except Exception as error:
        if "Unknown split" in str(error) or "Bad split" in str(error):
            available = str(error)[str(error).find("[") :].strip("[]. ").replace("'", "").split(", ")
            raise _no_split(name, split, available) from error
        kind = "a local folder" if path.exists() else "no local file"
        raise SieveError(
            f"the calibration data set {name!r} could not be read: it is {kind} and datasets.{call} failed with "
            f"{_in_one_line(error)}; load it yourself and pass the datasets.Dataset."
        ) from error


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def _no_split(name: str, split: str, available: list[str]) -> SieveError:
    return SieveError(
        f"the calibration data set {name!r} has no split {split!r}; its splits are "
        f"{', '.join(repr(item) for item in available)}: pass one as calib_split."
    )


def _import_datasets(purpose: str) -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise SieveError(f"{purpose} needs the datasets library; pip install peft-sieve[data].") from error


def _read_file(name: str, path: Path, max_samples: int, seed: int, all_columns: bool) -> Rows:
    suffix = _data_suffix(path)
    if suffix not in _FILE_SUFFIXES:
        raise SieveError(f"the calibration file {name!r} has the suffix {path.suffix!r}; expected {_SUFFIXES_TEXT}.")
    try:
        if suffix == ".parquet":
            dataset = _import_datasets(f"reading {name!r}").Dataset.from_parquet(str(path))
            return _read_dataset(dataset, name, max_samples, seed, all_columns)
        if suffix == ".csv":
            return _pick(name, lambda: _csv_records(path), max_samples, seed)
        if suffix == ".txt":
            return _pick(name, lambda: ({"text": line} for _, line in _lines(path)), max_samples, seed)
        if _starts_with_bracket(path):
            with _open_text(path) as file:
                records = json.load(file)
            positions = choose(len(records), max_samples, seed)
            return Rows(name, positions, [records[i] for i in positions])
        lines = _pick(name, lambda: _lines(path), max_samples, seed)
        return Rows(name, lines.positions, [_parse_line(name, number, line) for number, line in lines.rows])
    except SieveError:
        raise
    except Exception as error:
        raise SieveError(f"the calibration file {name!r} could not be read: {_in_one_line(error)}.") from error


def _pick(name: str, items: Callable[[], Iterator[Any]], max_samples: int, seed: int) -> Rows:
    """Goes through `items` twice, to count and to pick: a large file is never held in memory."""
    positions = choose(sum(1 for _ in items()), max_samples, seed)
    wanted = set(positions)
    return Rows(name, positions, [item for position, item in enumerate(items()) if position in wanted])


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


def _starts_with_bracket(path: Path) -> bool:
    return next((line.lstrip()[0] == "[" for _, line in _lines(path)), False)


def _parse_line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise SieveError(
            f"line {number} of the calibration file {name!r} is no JSON ({error}); expected one record a line, or one "
            "array of records."
        ) from error


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(2**31 - 1)  # a long document is one field
    try:
        with _open_text(path, newline="") as file:
            yield from csv.DictReader(file)
    finally:
        csv.field_size_limit(limit)
