"""Tensors changed where they lie in a safetensors file."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...errors import SieveError

# By the names in a safetensors header: what a weight may be stored as to have something added.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_CHUNK = 2**24

# Changes a tensor in place.
Edit = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class TensorInFile:
    """A tensor in a safetensors file."""

    dtype: str  # as the header names it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    def with_rows(self, rows: int) -> TensorInFile:
        """The same with another size of the first axis, at no place yet."""
        return TensorInFile(self.dtype, (rows, *self.shape[1:]), 0, self.num_bytes // self.shape[0] * rows)


def tensors_in_file(path: Path) -> dict[str, TensorInFile]:
    """The tensors of a file by their keys, from its header alone."""
    with safe_open(path, "pt"):
        pass  # so that a broken file is an error of its own; offsets are not to be had from it
    header, start = _header(path)
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[key] = TensorInFile(entry["dtype"], tuple(entry["shape"]), start + first, end - first)
    return tensors


def copy_file(
    path: Path, copied: Path, tensors: Mapping[str, TensorInFile], resized: Mapping[str, TensorInFile]
) -> None:
    """Copy a file of which some tensors get another size, and zeros for values.

    Args:
        tensors: what is in the file (`tensors_in_file`).
        resized: key -> what it becomes.
    """
    if not resized:
        shutil.copyfile(path, copied)
        return
    header, _ = _header(path)
    order = sorted(tensors, key=lambda key: tensors[key].offset)
    place = 0
    for key in order:
        new = resized.get(key, tensors[key])
        header[key] = {"dtype": new.dtype, "shape": new.shape, "data_offsets": (place, place + new.num_bytes)}
        place += new.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(path, "rb") as source, open(copied, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            if key in resized:
                target.truncate(target.seek(resized[key].num_bytes, os.SEEK_CUR))
                continue
            source.seek(tensors[key].offset)
            left = tensors[key].num_bytes
            while left:
                left -= target.write(source.read(min(left, _CHUNK)))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its tensors begin."""
    # 8 bytes for the header's length, the header in JSON, and then the tensors at offsets counted from its end.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor of a file."""
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
        return tensor


def refuse_other_types(tensors: Mapping[str, TensorInFile]) -> None:
    """Refuse tensors of types that nothing can be added to, such as those of quantised weights."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise SieveError(
                f"The base model's checkpoint holds {key} as {tensor.dtype}, not as one of {', '.join(_DTYPES)}. Pass "
                "a checkpoint that is not quantised as base_model."
            )


def edit_file(path: Path, tensors: Mapping[str, TensorInFile], edits: Mapping[str, Iterable[Edit]]) -> None:
    """Change tensors of a file, one after the other.

    Args:
        tensors: what is in the file (`tensors_in_file`).
        edits: key -> changes, made in this order.
    """
    if not edits:
        return
    with open(path, "r+b") as file:
        # Not closed by hand: a tensor may still look into it, in the traceback of an error for one.
        memory = mmap.mmap(file.fileno(), 0)
    for key, changes in edits.items():
        place = tensors[key]
        count = torch.Size(place.shape).numel()
        flat = torch.frombuffer(memory, dtype=_DTYPES[place.dtype], count=count, offset=place.offset)
        for change in changes:
            change(flat.view(place.shape))
    memory.flush()
