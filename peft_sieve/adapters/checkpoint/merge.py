"""An adapter merged into a checkpoint of its base model, file by file, without a model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import SieveError
from ...files import replaced_when_done
from ...tuners.common.tied import refuse_shared_modules
from ...tuners.sieve.config import SieveLoraConfig
from ..new_card import write_card
from ..reading import open_adapter, refuse_settings
from .base_files import BaseFiles, base_files, refuse_quantised
from .copying import copy_index, copy_the_rest, copy_tokenizer, is_read_too
from .edits import edits_of
from .embeddings import replaced_embeddings
from .in_place import Edit, copy_file, edit_file, read_tensor, refuse_other_types, tensors_in_file
from .keys import CheckpointKeys
from .vocabulary_size import refuse_other_weights_of_that_size, write_vocabulary_size


def merge_checkpoint(
    adapter: Any,
    base_model: Any,
    output_dir: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
) -> str:
    """Write a checkpoint of the base model with an adapter merged into it.

    The result has the base checkpoint's files, shards, names and types, and loads like it. No model is loaded: each
    file is copied, and the weights that change are changed where they lie in the copy, a matrix at a time, so that the
    memory needed is that of the adapter and of a matrix. Sums are made in float32 or wider and rounded once.
    Embeddings that came with the adapter take the place of the checkpoint's, and a tokenizer beside a saved adapter
    that of the base model.

    Args:
        adapter: a `PeftModel`, or the path or Hub id of a saved adapter.
        base_model: path or Hub id of the base model's checkpoint, in safetensors; None takes what the adapter names.
        output_dir: folder to write; its files appear together or not at all. It may not hold other weights.
        adapter_name: which adapter of the model; needed if it holds several sieve adapters.

    Returns:
        The folder.

    Raises:
        SieveError: there is no such checkpoint, its weights are quantised, it lacks one that the adapter changes, or
            the adapter holds more than factors and embeddings; nothing was written.
    """
    opened = open_adapter(adapter, base_model, adapter_name, _refuse_what_cannot_be_merged)
    if isinstance(base_model, str | os.PathLike):
        base = base_files(base_model, None)
    else:
        base = base_files(opened.base_name, opened.config.revision)
    output = _checked_output(output_dir, base)
    refuse_quantised(base)
    refuse_shared_modules(opened.base)
    files = {path: tensors_in_file(base.folder / path) for path in base.weights}
    stored = {key: tensor for tensors in files.values() for key, tensor in tensors.items()}
    prefix = f"{opened.base.base_model_prefix}."
    places = {key: base.folder / path for path, tensors in files.items() for key in tensors}
    keys = CheckpointKeys({key: tensor.shape for key, tensor in stored.items()}, prefix)
    replaced = replaced_embeddings(opened, keys, lambda key: read_tensor(places[key], key))
    resized = {key: stored[key].with_rows(len(w)) for key, w in replaced.items() if len(w) != stored[key].shape[0]}
    rows = next((tensor.shape[0] for tensor in resized.values()), None)
    if rows is not None:
        refuse_other_weights_of_that_size(opened, rows)
    edits: dict[str, list[Edit]] = {key: [partial(_set, weight)] for key, weight in replaced.items()}
    shapes = {key: tensor.shape for key, tensor in {**stored, **resized}.items()}
    for key, additions in edits_of(opened, CheckpointKeys(shapes, prefix)).items():
        edits.setdefault(key, []).extend(additions)
    refuse_other_types({key: stored[key] for key in edits})
    with replaced_when_done(output, "checkpoint") as staging:
        folder = Path(staging)
        copy_the_rest(base, folder)
        copy_tokenizer(adapter, folder)
        if rows is not None:
            write_vocabulary_size(base.config, opened, rows, folder)
        for path, tensors in files.items():
            copied = folder / path
            copied.parent.mkdir(parents=True, exist_ok=True)
            copy_file(base.folder / path, copied, tensors, {k: t for k, t in resized.items() if k in tensors})
            edit_file(copied, tensors_in_file(copied), {key: edits[key] for key in tensors if key in edits})
        copy_index(base, folder, sum(tensor.num_bytes - stored[key].num_bytes for key, tensor in resized.items()))
        text = "The base model's checkpoint, with a sparse expert adapter added to its weights by `peft_sieve`."
        tags = ["mixture-of-experts", "merge"]
        write_card(opened, staging, "{} with an adapter merged in", text, library="transformers", tags=tags)
    return str(output)


def _checked_output(output_dir: str | os.PathLike[str], base: BaseFiles) -> Path:
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or output.resolve() == base.folder.resolve()):
        raise SieveError(f"output_dir {str(output)!r} is a file, or the base model itself. Pass another folder.")
    replaced = {*base.weights, base.index}
    for path in sorted(output.glob("*")):
        if is_read_too(path.name) and Path(path.name) not in replaced:
            raise SieveError(
                f"output_dir {str(output)!r} holds {path.name}, which would be taken for a part of the checkpoint. "
                "Pass an empty folder."
            )
    return output


def _set(value: torch.Tensor, weight: torch.Tensor) -> None:
    weight.copy_(value)


def _refuse_what_cannot_be_merged(config: SieveLoraConfig) -> None:
    problem = "which cannot be added to a checkpoint. Load the model, call merge_and_unload() and save it."
    refuse_settings(config, ("modules_to_save", "trainable_token_indices", "bias"), problem)
