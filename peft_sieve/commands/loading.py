"""Models and tokenizers by name, with errors of one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..adapters.skeleton import model_classes
from ..checks import first_line
from ..errors import SieveError

_NOT_LOADABLE = (OSError, ValueError, KeyError, ImportError)


def load_model(
    name: str, device: str | None, dtype: str, trust_remote_code: bool, *, progress: bool = True
) -> PreTrainedModel:
    """A model to run, on its device.

    Args:
        name: path or Hub id.
        device: None for the first accelerator or else the CPU; "auto" to spread it over all devices.
        dtype: "auto", or the name of one of torch.
        trust_remote_code: whether code that comes with the model may run.
        progress: show a bar if standard error is a terminal.

    Raises:
        SieveError: there is no such model or device.
    """
    place = device or str(torch.accelerator.current_accelerator() or "cpu")
    if place != "auto":
        _check_device(place)
    with _bars_of_transformers(progress and sys.stderr.isatty()):
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            # The class that it was saved from, so that the layers are called as the adapter will find them.
            model_class, *_ = model_classes(config, LoraConfig())
            spread = {"device_map": "auto"} if place == "auto" else {}
            model = model_class.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **spread)
        except _NOT_LOADABLE as error:
            raise SieveError(
                f"The model {name!r} cannot be loaded ({first_line(error)}). Pass the path or Hub id of a model of "
                "transformers."
            ) from error
    return model if place == "auto" else model.to(place)


def load_tokenizer(name: str, trust_remote_code: bool, *, required: bool) -> Any:
    """The tokenizer of that name; None if there is none and none is required, since data may be token ids.

    Raises:
        SieveError: it is required, and cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except _NOT_LOADABLE as error:
        if not required:
            return None
        raise SieveError(
            f"The tokenizer {name!r} cannot be loaded ({first_line(error)}). Pass the path or Hub id of one."
        ) from error


def _check_device(place: str) -> None:
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SieveError(
            f"The device {place!r} cannot be used ({first_line(error)}). Pass one of this machine, such as cpu or "
            "cuda:0, or leave --device out."
        ) from error


@contextmanager
def _bars_of_transformers(wanted: bool) -> Iterator[None]:
    before = logging.is_progress_bar_enabled()
    try:
        if not wanted:
            logging.disable_progress_bar()
        yield
    finally:
        if before:
            logging.enable_progress_bar()
