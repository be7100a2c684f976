"""The files of a base model's checkpoint: which of them hold weights, and which go along as they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import SieveError

# Other formats, which hold the same weights again.
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")


def checkpoint_folder(name: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a checkpoint: itself, or downloaded from the Hub.

    Raises:
        SieveError: there is none.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return Path(name)
    try:
        ignored = [*(f"*{ending}" for ending in _OTHER_FORMATS), "*/*"]
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SieveError(
            f"The checkpoint of the base model is not found at {name!r}. Pass its folder or Hub id as base_model."
        ) from error


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        SieveError: one is not there.
    """
    names = [SAFE_WEIGHTS_NAME]
    if (source / SAFE_WEIGHTS_INDEX_NAME).is_file():
        names = sorted(set(json.loads((source / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()))
    for name in names:
        if not (source / name).is_file():
            raise SieveError(
                f"{str(source)!r} has no {name}, so it is not a whole checkpoint in safetensors. Download it again."
            )
    return [source / name for name in names]


def refuse_quantised(source: Path) -> None:
    """Refuse a checkpoint whose configuration says that its weights are quantised."""
    # As it is written: the class of a configuration may be code of its own.
    path = source / CONFIG_NAME
    content = json.loads(path.read_text()) if path.is_file() else {}
    for part in (content, content.get("text_config") or {}):
        quantised = part.get("quantization_config")
        if quantised is not None:
            raise SieveError(
                f"The base model's checkpoint is quantised ({quantised.get('quant_method')}). Pass the checkpoint that "
                "it was made from as base_model."
            )


def copy_the_rest(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer, code: all that is not weights. The card would tell of the base model."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "README.md" and not path.name.endswith((".safetensors", *_OTHER_FORMATS)):
            shutil.copyfile(path, folder / path.name)
