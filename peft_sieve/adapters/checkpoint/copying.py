"""What goes along with a checkpoint's weights: configuration, tokenizer, chat templates, code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME

from .base_files import OTHER_FORMATS, BaseFiles

# Of an adapter or a trainer, and the card, which would tell of the base model.
_LEFT = (ADAPTER_CONFIG_NAME, "README.md", "trainer_state.json", "zero_to_fp32.py", "runs/*")
# A folder with one of these is another checkpoint, or an adapter.
_OTHERS = (CONFIG_NAME, ADAPTER_CONFIG_NAME, "trainer_state.json")
_TOKENIZER = "tokenizer_config.json"
_TEMPLATES = ("chat_template.*", "additional_chat_templates/*")
# Without which a tokenizer may do, so that those of another must not stay.
_OPTIONAL = ("special_tokens_map.json", "added_tokens.json")
_OF_TOKENIZER = (
    *("tokenizer.json", _TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken"),
    *("spiece.model", "sentencepiece.bpe.model", *_OPTIONAL, *_TEMPLATES),
)


def is_read_too(name: str) -> bool:
    """Whether transformers or a server reads a file of that name beside a checkpoint in safetensors."""
    return name == ADAPTER_CONFIG_NAME or name.endswith((".safetensors", ".safetensors.index.json"))


def copy_the_rest(files: BaseFiles, folder: Path) -> None:
    """Copy all that a checkpoint has besides weights."""
    for path in _inside(files.folder):
        if not _matches(path, _LEFT) and not path.name.endswith((".safetensors", ".index.json", *OTHER_FORMATS)):
            _copy(files.folder, path, folder)


def copy_index(files: BaseFiles, folder: Path, bytes_more: int) -> None:
    """Copy the index of the weights, if there is one.

    Args:
        bytes_more: by how much the weights have grown.
    """
    if files.index is None:
        return
    _copy(files.folder, files.index, folder)
    content = json.loads((files.folder / files.index).read_text())
    size = (content.get("metadata") or {}).get("total_size")
    if bytes_more and size is not None:
        content["metadata"]["total_size"] = size + bytes_more
        content["metadata"].pop("total_parameters", None)
        (folder / files.index).write_text(json.dumps(content, indent=2) + "\n")


def copy_tokenizer(adapter: Any, folder: Path) -> None:
    """Copy the tokenizer that lies beside a saved adapter over the base model's: the adapter was trained with it."""
    if not isinstance(adapter, str | os.PathLike):
        return
    source = Path(adapter)
    if not source.is_dir():
        with suppress(HfHubHTTPError, HFValidationError, OSError):
            source = Path(snapshot_download(os.fspath(adapter), allow_patterns=list(_OF_TOKENIZER)))
    if not (source / _TOKENIZER).is_file():
        return
    own = [path for path in _inside(source) if _matches(path, _OF_TOKENIZER)]
    has_template = (
        any(_matches(path, _TEMPLATES) for path in own) or "chat_template" in (source / _TOKENIZER).read_text()
    )
    for path in list(_inside(folder)):
        if _matches(path, (*_OPTIONAL, *_TEMPLATES) if has_template else _OPTIONAL):
            (folder / path).unlink()
    for path in own:
        _copy(source, path, folder)


def _inside(folder: Path) -> Iterator[Path]:
    """Paths of files inside a folder, without hidden ones and those of other checkpoints in it."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not any(Path(place, name, other).exists() for other in _OTHERS)
        )
        yield from (Path(place, name).relative_to(folder) for name in sorted(names) if not name.startswith("."))


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.as_posix(), pattern) for pattern in patterns)


def _copy(source: Path, path: Path, folder: Path) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / path, folder / path)
