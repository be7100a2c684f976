"""An adapter merged into a checkpoint of its base model, file by file, without a model."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.tuners.lora.layer import Conv2d, Embedding, LoraLayer, ParamWrapper, _ConvNd
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import SieveError
from ..files import replaced_when_done
from ..moe.topology import MoELayer
from ..tuners.sieve.config import SieveLoraConfig
from ..tuners.sieve.layer import SieveExpertLayer
from .checkpoint_names import expert_names, module_names, stack_names
from .opened import OpenedAdapter, open_adapter
from .stacks import matrix_in, parameter_of

# By the names in a safetensors header; what a weight may be stored as to have something added.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")

# Adds its part to a tensor of the checkpoint, in place.
_Edit = Callable[[torch.Tensor], None]


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
        source = _checkpoint_folder(base_model, None)
    else:
        source = _checkpoint_folder(opened.base_name, opened.config.revision)
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or output.resolve() == source.resolve()):
        raise SieveError(
            f"output_dir {str(output)!r} is a file, or the base model itself, expected another folder: pass one"
        )
    _refuse_quantised(source)
    files = _weight_files(source)
    edits = _edits(opened, {key for keys in files.values() for key in keys})
    for name in files:
        _check_types(_places(source / name), edits)
    with replaced_when_done(output) as staging:
        for name, keys in files.items():
            shutil.copyfile(source / name, Path(staging, name))
            _edit_file(Path(staging, name), {key: edits[key] for key in keys if key in edits})
        _copy_the_rest(source, Path(staging))
        _write_card(opened, Path(staging, "README.md"))
    return str(output)


# --- the base checkpoint --------------------------------------------------------------------------------------------


def _checkpoint_folder(name: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(name)
    if os.path.isdir(name):
        return Path(name)
    try:
        # Other formats hold the same weights again.
        others = [f"*{ending}" for ending in _OTHER_WEIGHTS[1:]]
        return Path(snapshot_download(name, revision=revision, ignore_patterns=[*others, "*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SieveError(
            f"received {name!r} as the base model, expected a folder or a Hub id with its checkpoint, since merging "
            "adds to the files: pass it as base_model"
        ) from error


def _weight_files(source: Path) -> dict[str, list[str]]:
    """File name -> keys in it."""
    if (source / SAFE_WEIGHTS_INDEX_NAME).is_file():
        weight_map = json.loads((source / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    files = {}
    for name in names:
        if not (source / name).is_file():
            raise SieveError(
                f"{str(source)!r} holds no {name}, expected a whole checkpoint in safetensors: download it again"
            )
        with safe_open(source / name, "pt") as file:
            files[name] = list(file.keys())
    return files


def _copy_the_rest(source: Path, staging: Path) -> None:
    """Configuration, tokenizer, code: all that is no weight. The card would tell of the base model."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "README.md" and not path.name.endswith(_OTHER_WEIGHTS):
            shutil.copyfile(path, staging / path.name)


def _refuse_what_cannot_be_merged(config: SieveLoraConfig) -> None:
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise SieveError(
                f"the adapter has {name}={getattr(config, name)}, expected low-rank factors only, since those can be "
                "added to a checkpoint: load the model, call merge_and_unload() and save it"
            )
    if config.bias != "none":
        raise SieveError(
            f"the adapter has bias={config.bias!r}, expected 'none', since only low-rank factors can be added to a "
            "checkpoint: load the model, call merge_and_unload() and save it"
        )


def _refuse_quantised(source: Path) -> None:
    # As it is written: the class of a configuration may be code of its own.
    path = source / CONFIG_NAME
    content = json.loads(path.read_text()) if path.is_file() else {}
    for part in (content, content.get("text_config") or {}):
        quantised = part.get("quantization_config")
        if quantised is not None:
            raise SieveError(
                f"the base model's checkpoint is quantised ({quantised.get('quant_method')}), expected weights of 16 "
                "bits or more: pass the checkpoint that it was made from as base_model"
            )


# --- what changes ---------------------------------------------------------------------------------------------------


def _edits(opened: OpenedAdapter, keys: set[str]) -> dict[str, list[_Edit]]:
    """Key of the checkpoint -> what is added to it.

    Raises:
        SieveError: the checkpoint has no weight that the adapter changes.
    """
    skeleton = opened.new_skeleton()
    edits: dict[str, list[_Edit]] = {}

    def find(candidates: list[str]) -> str | None:
        # A checkpoint of the model without its head, or with it, has the same weights under shorter or longer names.
        prefix = f"{skeleton.base_model_prefix}."
        wider = [c.removeprefix(prefix) for c in candidates] + [prefix + c for c in candidates]
        return next((c for c in (*candidates, *wider) if c in keys), None)

    def add(candidates: list[str], edit: _Edit) -> None:
        key = find(candidates)
        if key is None:
            raise SieveError(
                f"the base model's checkpoint has no weight {candidates[0]!r}, which the adapter changes, expected the "
                "checkpoint of the model that it was trained on: pass that as base_model"
            )
        edits.setdefault(key, []).append(edit)

    others = dict(opened.other_layers())
    names = module_names(skeleton, others)
    for path, layer in others.items():
        _refuse_tied(opened, path, layer)
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        add([f"{names[path]}.{parameter}", f"{path}.{parameter}"], _matrix_edit(layer, opened.name))
    moe = {layer.path: layer for layer in opened.moe_layers()}
    for path, adapted in opened.expert_layers().items():
        for candidates, edit in _expert_edits(skeleton, moe[path], adapted, opened.name, find):
            add(candidates, edit)
    return edits


def _expert_edits(
    skeleton: PreTrainedModel,
    layer: MoELayer,
    adapted: SieveExpertLayer,
    name: str,
    find: Callable[[list[str]], str | None],
) -> Iterator[tuple[list[str], _Edit]]:
    plan = adapted.plans[name]
    separate = expert_names(skeleton, layer) or {}
    if any(find([f"{matrix}.weight"]) for matrix in separate.values()):
        for projection in plan.ranks:
            for expert in plan.experts:

                def add(weight: torch.Tensor, projection: str = projection, expert: int = expert) -> None:
                    _add(weight, adapted.get_delta_weight(name, projection, expert))

                yield [f"{separate[projection, expert]}.weight"], add
        return
    stacks = stack_names(skeleton, layer)
    for projection in plan.ranks:
        parameter = parameter_of(layer, projection)

        def add_to_stack(stack: torch.Tensor, projection: str = projection) -> None:
            for expert in plan.experts:
                weight = matrix_in(layer, stack, projection, expert)
                _add(weight, adapted.get_delta_weight(name, projection, expert))

        yield [stacks.get(parameter, f"{layer.path}.{parameter}"), f"{layer.path}.{parameter}"], add_to_stack


def _matrix_edit(layer: LoraLayer, name: str) -> _Edit:
    def add(weight: torch.Tensor) -> None:
        if isinstance(layer, Embedding):
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = layer.scaling[name] * (b.detach().cpu().to(wide) @ a.detach().cpu().to(wide))
        _add(weight, delta.T if isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False) else delta)

    return add


def _add(weight: torch.Tensor, delta: torch.Tensor) -> None:
    if weight.shape != delta.shape:
        raise SieveError(
            f"the base model's checkpoint has a weight of shape {tuple(weight.shape)} where the adapter adds "
            f"{tuple(delta.shape)}, expected the checkpoint of its own base model: pass that as base_model"
        )
    wide = torch.promote_types(weight.dtype, delta.dtype)
    weight.copy_((weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype))


def _refuse_tied(opened: OpenedAdapter, path: str, layer: LoraLayer) -> None:
    if isinstance(layer, Conv2d | _ConvNd):
        raise SieveError(
            f"the adapter is on the convolution {path}, expected linear layers and experts: load the model, call "
            "merge_and_unload() and save it"
        )
    base = opened.base
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    if tied and any(layer is end for end in ends):
        raise SieveError(
            f"the adapter is on {path}, whose weight is also that of the other end of the model, expected it untied, "
            "since a checkpoint has one weight for both: train without an adapter there"
        )


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file."""

    dtype: str
    shape: list[int]
    offset: int


def _places(path: Path) -> dict[str, _Place]:
    """The safetensors header: 8 bytes for its length, JSON, and then the tensors at offsets counted from its end."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: _Place(entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _check_types(places: dict[str, _Place], edits: dict[str, list[_Edit]]) -> None:
    for key, place in places.items():
        if key in edits and place.dtype not in _DTYPES:
            raise SieveError(
                f"the base model's checkpoint holds {key} as {place.dtype}, expected one of {', '.join(_DTYPES)}: pass "
                "a checkpoint that is not quantised as base_model"
            )


def _edit_file(path: Path, edits: dict[str, list[_Edit]]) -> None:
    if not edits:
        return
    places = _places(path)
    with open(path, "r+b") as file:
        # Not closed by hand: a tensor may still look into it, in the traceback of an error for one.
        memory = mmap.mmap(file.fileno(), 0)
    for key, of_key in edits.items():
        place = places[key]
        count = torch.Size(place.shape).numel()
        flat = torch.frombuffer(memory, dtype=_DTYPES[place.dtype], count=count, offset=place.offset)
        for edit in of_key:
            edit(flat.view(place.shape))
    memory.flush()


def _write_card(opened: OpenedAdapter, path: Path) -> None:
    data = ModelCardData(library_name="transformers", tags=["mixture-of-experts", "merge"])
    if opened.base_name and not os.path.exists(opened.base_name):
        data.base_model = opened.base_name
    text = (
        f"# {data.base_model or 'A Mixture-of-Experts model'} with an adapter merged in\n\n"
        "The base model's checkpoint, with a sparse expert adapter added to its weights by `peft_sieve`.\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
