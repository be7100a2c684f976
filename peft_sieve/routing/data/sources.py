"""Where calibration data come from: files, the Hub, `datasets` objects, Python sequences and iterables.

A source gives the rows that calibration uses and no more: which ones is decided before they are read.
"""

import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ...checks import one_line, quoted, shown
from ...errors import SieveError, out_of_memory
from .local_files import data_suffix, read_file
from .ready_batches import ModelBatches, is_model_batch
from .rows import fits_a_form, is_read

ACCEPTED = (
    "a Hub id or a local file (str), a datasets.Dataset, a list of str or dicts, or an iterable of model-ready batches"
)
STREAM_BUFFER = 1_000  # rows of a stream among which the samples are drawn, at least

_NOTHING = object()
_UNREAD = ("video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Rows:
    """The chosen rows, each with its position in the data.

    Attributes:
        columns: of the data, if they have more than the rows.
    """

    name: str
    positions: Sequence[int]
    rows: Sequence[Any]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """Which rows of the data are wanted.

    Attributes:
        max_samples: rows at most.
        seed: which ones, where there are more.
        split: of data that have several: on the Hub, in a folder or in a `DatasetDict`.
        all_columns: every column of a `datasets.Dataset`, not only those that rows are known by.
    """

    max_samples: int
    seed: int
    split: str = "train"
    all_columns: bool = False

    def __call__(self, count: int) -> Sequence[int]:
        """Positions of the wanted ones of `count` items, ascending; the same for a seed."""
        if count <= self.max_samples:
            return range(count)
        return sorted(random.Random(self.seed).sample(range(count), self.max_samples))

    @property
    def buffer(self) -> int:
        """Rows of a stream that are read, to choose among them."""
        return max(STREAM_BUFFER, 2 * self.max_samples)


def read_source(data: Any, choice: Choice) -> Rows | ModelBatches:
    """Reads the rows that calibration uses.

    Args:
        data: `ACCEPTED`.
        choice: which rows.

    Raises:
        SieveError: the data cannot be found or read, have no such split, no rows or no usable type.
    """
    named = isinstance(data, str | os.PathLike)
    source = _read_named(os.fsdecode(data), choice) if named else _read_object(data, None, choice)
    if isinstance(source, Rows) and not source.rows:
        raise SieveError(f"The calibration data set {source.name!r} is empty. Pass at least one row.")
    if isinstance(source, Rows) and not choice.all_columns:
        _warn_of_unread(source)
    return source


def _warn_of_unread(source: Rows) -> None:
    columns = source.columns or (list(source.rows[0]) if isinstance(source.rows[0], Mapping) else [])
    unread = [column for column in columns if column in _UNREAD]
    if unread:
        warnings.warn(
            f"The calibration data {source.name!r} have the columns {quoted(unread)}, which are left out: rows are "
            "read with text and images only. For others, pass batches that the model's processor made.",
            UserWarning,
        )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Around reading data: what they raise themselves, as one sentence.

    Raises:
        SieveError: they do; memory that runs out is nothing of theirs.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SieveError) or out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise SieveError(f"The calibration data {name!r} could not be read: {problem}.") from error


# --- objects ---------------------------------------------------------------------------------------------------------


def _read_object(data: Any, name: str | None, choice: Choice) -> Rows | ModelBatches:
    type_name = type(data).__name__
    hf = sys.modules.get("datasets")  # an object of it can exist only if it has been imported
    if hf is not None and isinstance(data, hf.DatasetDict | hf.IterableDatasetDict):
        if choice.split not in data:
            raise _no_split(name or type_name, choice.split, data)
        return _read_object(data[choice.split], name, choice)
    if hf is not None and isinstance(data, hf.Dataset):
        return _read_dataset(data, name, choice)
    if hf is not None and isinstance(data, hf.IterableDataset):
        shuffled = data.with_format(None).shuffle(seed=choice.seed % 2**32, buffer_size=choice.buffer)
        name = name or _dataset_name(data)
        with reading(name):
            rows = list(shuffled.take(choice.max_samples))
        return Rows(name, range(len(rows)), rows)
    if is_model_batch(data):
        return ModelBatches(type_name, [data])
    if _is_indexable(data):
        with reading(type_name):
            if len(data) and is_model_batch(data[0]):
                return ModelBatches(type_name, data)
            positions = choice(len(data))
            return Rows(name or type_name, positions, [data[i] for i in positions])
    if isinstance(data, Iterable) and not isinstance(data, Mapping | bytes | bytearray | memoryview):
        return _read_iterable(data, choice)
    raise SieveError(f"The calibration data are of type {type_name}. Pass {ACCEPTED}.")


def _is_indexable(data: Any) -> bool:
    if isinstance(data, Dataset):
        return hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return isinstance(data, Sequence) and not isinstance(data, bytes | bytearray | memoryview)


def _read_iterable(data: Iterable[Any], choice: Choice) -> Rows | ModelBatches:
    type_name = type(data).__name__
    with reading(type_name):
        items = iter(data)
        first = next(items, _NOTHING)
    if first is _NOTHING:
        raise SieveError(f"The calibration data, a {type_name}, yield nothing. Pass data that have not been consumed.")
    if is_model_batch(first):
        return ModelBatches(type_name, chain([first], items))
    if not isinstance(data, Iterator):
        # Iterating a set or a DataFrame gives str too: in no order, or the names of columns.
        raise SieveError(
            f"The calibration data, a {type_name}, yield items of type {type(first).__name__}, not model-ready batches "
            "(dicts with 2-D `input_ids`). Pass rows as a list or a datasets.Dataset."
        )
    with reading(type_name):
        seen = [first, *islice(items, choice.buffer - 1)]
    positions = choice(len(seen))
    return Rows(type_name, positions, [seen[i] for i in positions])


def _read_dataset(data: Any, name: str | None, choice: Choice) -> Rows:
    positions = choice(len(data))
    chosen = data.select(positions)
    if chosen.format["type"] != "custom":  # a transform makes the rows; any other format only dresses them
        chosen = chosen.with_format(None, columns=chosen.format["columns"])
        columns = chosen.format["columns"]
        if fits_a_form(columns) and not choice.all_columns:  # so that nothing is decoded without need
            chosen = chosen.select_columns([column for column in columns if is_read(column)])
    name = name or _dataset_name(data)
    with reading(name):
        return Rows(name, positions, list(chosen), data.column_names)


def _dataset_name(data: Any) -> str:
    name = getattr(data.info, "dataset_name", None)
    # Built from a file or a generator, a data set has the name of the builder.
    return name if name and name not in ("json", "csv", "parquet", "text", "generator") else type(data).__name__


# --- names: local files and folders, the Hub -------------------------------------------------------------------------


def _read_named(name: str, choice: Choice) -> Rows | ModelBatches:
    if not name.strip():
        raise SieveError(f"The calibration data set has an empty str as its name. Pass {ACCEPTED}.")
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:
        raise _no_name(name) from error
    if path.is_file() and data_suffix(path) != ".parquet":
        return Rows(name, *read_file(name, path, choice))
    if not there and _looks_like_path(name):
        raise SieveError(f"The calibration file {name!r} does not exist.")
    if not there and any(map(str.isspace, name)):
        raise _no_name(name)
    return _read_object(_load(name, path, choice.split), name, choice)


def _no_name(name: str) -> SieveError:
    return SieveError(
        f"The calibration data set {shown(name)} is neither a file nor a Hub id. To calibrate on a text, pass [text]."
    )


def _looks_like_path(name: str) -> bool:
    """Whether `name` can only be a path: a Hub id is `name` or `org/name`."""
    return (
        name.startswith((".", "~"))
        or os.path.isabs(name)
        or name.count("/") > 1
        or (os.sep != "/" and os.sep in name)
        or data_suffix(Path(name)) is not None
    )


def _load(name: str, path: Path, split: str) -> Any:
    """What the datasets library makes of a parquet file, a folder, or a data set on the Hub."""
    try:
        hf = import_module("datasets")
    except ImportError as error:
        raise SieveError(f"Reading {name!r} needs the datasets library. Run pip install peft-sieve[data].") from error
    where = str(path) if path.exists() else name
    saved = any((path / entry).is_file() for entry in ("state.json", "dataset_dict.json"))
    try:
        if path.is_file():
            return hf.Dataset.from_parquet(where)
        return hf.load_from_disk(where) if saved else hf.load_dataset(where, split=split)
    except Exception as error:
        if out_of_memory(error):
            raise
        if "Unknown split" in str(error) or "Bad split" in str(error):
            available = str(error)[str(error).find("[") :].strip("[]. ").replace("'", "").split(", ")
            raise _no_split(name, split, available) from error
        kind = "a local file" if path.is_file() else "a local folder" if path.exists() else "not a local file"
        raise SieveError(
            f"The calibration data set {name!r}, which is {kind}, could not be read: {type(error).__name__}: "
            f"{one_line(error)}. Load it with the datasets library and pass the datasets.Dataset."
        ) from error


def _no_split(name: str, split: str, available: Iterable[str]) -> SieveError:
    return SieveError(
        f"The calibration data set {name!r} has no split {split!r}. Pass one of {quoted(available)} as calib_split."
    )
