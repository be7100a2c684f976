"""An adapter merged into a checkpoint of its base model, file by file, without a model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ...errors import SieveError
from ...files import replaced_when_done
from ...tuners.common.tied import refuse_shared_modules
from ...tuners.sieve.config import SieveLoraConfig
from ..new_card import write_card
from ..reading import open_adapter, refuse_settings
from .base_files import checkpoint_folder, copy_the_rest, refuse_quantised, weight_files
from .edits import edits_of
from .in_place import edit_file, refuse_other_types, tensors_in_file


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

    Args:
        adapter: a `PeftModel`, or the path or Hub id of a saved adapter.
        base_model: path or Hub id of the base model's checkpoint, in safetensors; None takes what the adapter names.
        output_dir: folder to write; its files appear together or not at all.
        adapter_name: which adapter of the model; needed if it holds several sieve adapters.

    Returns:
        The folder.

    Raises:
        SieveError: there is no such checkpoint, its weights are quantised, or it lacks one that the adapter changes;
            nothing was written.
    """
    opened = open_adapter(adapter, base_model, adapter_name, _refuse_what_cannot_be_merged)
    if isinstance(base_model, str | os.PathLike):
        source = checkpoint_folder(base_model, None)
    else:
        source = checkpoint_folder(opened.base_name, opened.config.revision)
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or output.resolve() == source.resolve()):
        raise SieveError(f"output_dir {str(output)!r} is a file, or the base model itself. Pass another folder.")
    refuse_quantised(source)
    refuse_shared_modules(opened.base)
    files = {path: tensors_in_file(path) for path in weight_files(source)}
    stored = {key: tensor for tensors in files.values() for key, tensor in tensors.items()}
    edits = edits_of(opened, {key: tensor.shape for key, tensor in stored.items()})
    refuse_other_types({key: stored[key] for key in edits})
    with replaced_when_done(output) as staging:
        for path, tensors in files.items():
            copied = Path(shutil.copyfile(path, Path(staging, path.name)))
            edit_file(copied, tensors, {key: edits[key] for key in tensors if key in edits})
        copy_the_rest(source, Path(staging))
        text = "The base model's checkpoint, with a sparse expert adapter added to its weights by `peft_sieve`."
        tags = ["mixture-of-experts", "merge"]
        write_card(opened, staging, "{} with an adapter merged in", text, library="transformers", tags=tags)
    return str(output)


def _refuse_what_cannot_be_merged(config: SieveLoraConfig) -> None:
    problem = "which cannot be added to a checkpoint. Load the model, call merge_and_unload() and save it."
    refuse_settings(config, ("modules_to_save", "trainable_token_indices", "bias"), problem)
