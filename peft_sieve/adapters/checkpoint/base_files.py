"""The files of a base model's checkpoint: which of them hold the weights that transformers reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import SieveError

# Other formats, which hold the same weights again, and the states of trainers.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ckpt", ".distcp", ".ot")


@dataclass(frozen=True)
class BaseFiles:
    """What of a checkpoint transformers reads.

    Attributes:
        folder: of the checkpoint.
        weights: its safetensors files, as paths inside the folder.
        index: which of them has which weight, likewise; None if one file has all.
        config: what its `config.json` says.
    """

    folder: Path
    weights: tuple[Path, ...]
    index: Path | None
    config: dict[str, Any]


def base_files(name: str | os.PathLike[str], revision: str | None) -> BaseFiles:
    """The files of a checkpoint in a folder, or downloaded from the Hub.

    Raises:
        SieveError: there is no checkpoint in safetensors, or a file of it is not there.
    """
    fetch = partial(_fetch, os.fspath(name), revision)
    folder = fetch(ignore_patterns=["*.safetensors", *(f"*{ending}" for ending in OTHER_FORMATS)])
    # As it is written: the class of a configuration may be code of its own.
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text()) if path.is_file() else {}
    # The order of transformers: what the configuration names, one file, or an index of several.
    names = (config.get("transformers_weights"), SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    first = next((n for n in names if n and (fetch(allow_patterns=[n]) / n).is_file()), SAFE_WEIGHTS_NAME)
    index = Path(first) if first.endswith(".json") else None
    weights = [first] if index is None else sorted(set(_weight_map(folder / index).values()))
    fetch(allow_patterns=weights)
    for weight in weights:
        if Path(weight).is_absolute() or ".." in Path(weight).parts or not (folder / weight).is_file():
            raise SieveError(
                f"{str(folder)!r} has no {weight}, so it is not a whole checkpoint in safetensors. Download it again."
            )
    return BaseFiles(folder, tuple(map(Path, weights)), index, config)


def refuse_quantised(files: BaseFiles) -> None:
    """Refuse a checkpoint whose configuration says that its weights are quantised."""
    for part in (files.config, files.config.get("text_config") or {}):
        quantised = part.get("quantization_config")
        if quantised is not None:
            raise SieveError(
                f"The base model's checkpoint is quantised ({quantised.get('quant_method')}). Pass the checkpoint that "
                "it was made from as base_model."
            )


def _fetch(name: str, revision: str | None, **patterns: Any) -> Path:
    """The folder of a checkpoint, with files of some patterns downloaded if it is on the Hub."""
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SieveError(
            f"The checkpoint of the base model is not found at {name!r}. Pass its folder or Hub id as base_model."
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map
    except (ValueError, KeyError, TypeError) as error:
        raise SieveError(f"{str(index)!r} is not an index of weights. Download the checkpoint again.") from error
