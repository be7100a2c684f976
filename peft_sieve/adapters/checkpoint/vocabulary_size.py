"""The size of the vocabulary in the configuration of a checkpoint whose embeddings have another number of rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ...errors import SieveError
from ..reading import OpenedAdapter
from ..skeleton import maker_of
from ..vocabulary import path_of_text


def write_vocabulary_size(config: dict[str, Any], opened: OpenedAdapter, rows: int, folder: Path) -> None:
    """Write a checkpoint's configuration with another size of its vocabulary.

    Args:
        config: what it was.
    """
    changed = copy.deepcopy(config)
    part = changed
    for name in path_of_text(changed, opened.base.config):
        part = part.setdefault(name, {})
    part["vocab_size"] = rows
    (folder / CONFIG_NAME).write_text(json.dumps(changed, indent=2) + "\n")


def refuse_other_weights_of_that_size(opened: OpenedAdapter, rows: int) -> None:
    """Refuse a model that has more of the vocabulary's size than the embeddings that were resized.

    Raises:
        SieveError: a model with the new size has a weight of another shape.
    """
    config = copy.deepcopy(opened.base.config)
    config.get_text_config().vocab_size = rows
    resized = {name: tuple(value.shape) for name, value in opened.new_skeleton().state_dict().items()}
    live = {name.replace(".base_layer", ""): tuple(value.shape) for name, value in opened.base.state_dict().items()}
    for name, value in maker_of(type(opened.base), config, "")().state_dict().items():
        shapes = {resized.get(name), live.get(name)} - {None}
        if rows in value.shape and shapes - {tuple(value.shape)}:
            raise SieveError(
                f"The vocabulary was resized to {rows}, and {name} still has the size of the former one. transformers "
                "cannot load such a checkpoint: train without resizing."
            )
