"""The two files of a saved adapter before they are loaded: whole, readable, and of one save."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checks import shown
from ..errors import SieveError
from ..files import finish_interrupted_save
from .methods import method_of, methods

_IN_PEFT_MODEL = "base_model.model."
_AGAIN = "Save or download the adapter again."


def finish_interrupted_saves(folder: str | os.PathLike[str]) -> None:
    """Finish a save of the adapter in `folder`, or of all adapters of a model, which are saved as one."""
    # An adapter with a name is saved into a folder of the model's, so a crash leaves its files one level up.
    for place in (Path(folder).parent, Path(folder)):
        finish_interrupted_save(place)


def check_config_file(path: str) -> None:
    """What precedes PEFT's reading of an `adapter_config.json`: finish an interrupted save, then look at the file.

    Of adapters of other methods no weights are opened, as long as their configuration can be read.

    Raises:
        SieveError: the file is of an adapter of this package, but cut short or changed, or the weights beside it do not
            belong to it.
    """
    folder = Path(path).parent
    finish_interrupted_saves(folder)
    text = Path(path).read_text(errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if any(f'"{method.name}' in text or _named_in(text, method.only_fields) for method in methods()) or _ours(
            folder
        ):
            raise SieveError(f"{path} is not JSON ({error}). {_AGAIN}") from error
        return
    if not isinstance(content, dict):
        if _ours(folder):
            raise SieveError(f"{path} does not hold a mapping of settings. {_AGAIN}")
        return
    method = method_of(content.get("peft_type"))
    if method is None:
        _refuse_other_type(path, content)
        return
    if weights_file(folder) is not None and method.check_files is not None:
        method.check_files(content, folder)


def _refuse_other_type(path: str, content: dict[str, Any]) -> None:
    for method in methods():
        fields = [field for field in method.only_fields if field in content]
        if fields:
            raise SieveError(
                f"{path} has peft_type {shown(content.get('peft_type'))} and {fields[0]}, a setting of {method.name}. "
                f"{_AGAIN}"
            )


def _named_in(text: str, fields: Iterable[str]) -> bool:
    return any(f'"{field}"' in text for field in fields)


def _ours(folder: Path) -> bool:
    """Whether the weights there are of a method of this package."""
    parts = [part for method in methods() for part in method.only_keys]
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            return any(part in key for key in file.keys() for part in parts)  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError):
        return False


def weights_file(folder: Path) -> Path | None:
    """The weights beside a configuration; None if they are not there yet: the Hub's client brings one file at a time.

    Raises:
        SieveError: there is a pickled file in their place, or they cannot be read.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        if (folder / WEIGHTS_NAME).exists():
            raise SieveError(
                f"{folder} holds {WEIGHTS_NAME}, a pickled file, and not {SAFETENSORS_WEIGHTS_NAME}. Save the adapter "
                "with save_pretrained of this package, or download it again."
            )
        return None
    try:
        with safe_open(weights, "pt"):
            return weights
    except SafetensorError as error:
        raise broken_weights(weights, error) from error


def broken_weights(path: str | os.PathLike[str], error: Exception) -> SieveError:
    """The error for a weights file that cannot be read."""
    return SieveError(f"{path} cannot be read as safetensors ({error}). {_AGAIN}")


@contextmanager
def explained(path: Any, is_ours: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Errors that come up while the weights in a folder or repository are loaded, in words that help.

    Args:
        is_ours: asked after an error: whether they are of an adapter of this package.
    """
    try:
        yield
    except Exception as error:
        explanation = _explanation(error, path) if is_ours() else None
        if explanation is None:
            raise
        raise explanation from error


def _explanation(error: Exception, path: Any) -> SieveError | None:
    if isinstance(error, SafetensorError):
        return broken_weights(path, error)
    if isinstance(error, KeyError) and str(error.args[0]).startswith(_IN_PEFT_MODEL):  # what is trained whole
        return SieveError(f"The weights in {path} have no {error.args[0]}. {_AGAIN}")
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in names):
        return SieveError(f"{path} holds no {SAFETENSORS_WEIGHTS_NAME} beside {CONFIG_NAME}. {_AGAIN}")
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return SieveError(
            f"The weights in {path} have other shapes than the adapter (the report above lists them). Load them under "
            "the configuration and the base model that they were saved with."
        )
    return None


def unmap(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter that was mapped from its file memory of its own.

    Mapped memory may be unaligned, where products round differently, and changes when the file does.
    """
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            held = getattr(layer, name, None)
            part = held[adapter_name] if isinstance(held, nn.Module) and adapter_name in held else None  # type: ignore
            if isinstance(part, nn.Parameter):  # a bare one where embeddings are adapted
                part.data = part.data.clone()
            elif isinstance(part, nn.Module):
                for parameter in part.parameters():
                    parameter.data = parameter.data.clone()
                for inner in part.modules():
                    for buffer_name, buffer in inner.named_buffers(recurse=False):
                        setattr(inner, buffer_name, buffer.clone())
