"""An adapter merged into a checkpoint of its base model, file by file, without a model."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.tuners.lora.layer import Conv2d, Embedding, LoraLayer, ParamWrapper, _ConvNd
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import SieveError
from ...files import replaced_when_done
from ...moe.families.modules import ModuleExperts
from ...moe.topology import MoELayer
from ...tuners.common.tied import refuse_tied_experts
from ...tuners.sieve.config import SieveLoraConfig
from ..reading import OpenedAdapter, open_adapter
from ..stack_layout import is_stack, is_transposed, matrix_in, parameter_of, parameters_of
from .rows import Index, Part, block_of, own_rows, row_maps, row_numbers

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
    refuse_tied_experts(opened.base)
    files = _weight_files(source)
    places = {key: place for name in files for key, place in _places(source / name).items()}
    edits = _edits(opened, {key: tuple(place.shape) for key, place in places.items()})
    _check_types(places, edits)
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


def _edits(opened: OpenedAdapter, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[_Edit]]:
    """Key of the checkpoint -> what is added to it.

    Args:
        shapes: of the weights in the checkpoint.

    Raises:
        SieveError: the checkpoint has no weight that the adapter changes, or one of another shape.
    """
    skeleton = opened.new_skeleton()
    added: dict[str, list[_Added]] = {}
    for matrix in itertools.chain(_added_by_others(opened), _added_by_experts(opened)):
        added.setdefault(block_of(matrix.weight), []).append(matrix)
    layers = opened.moe_layers()
    edits: dict[str, list[_Edit]] = {}
    prefix = f"{skeleton.base_model_prefix}."

    def find(key: str) -> str | None:
        # A checkpoint of the model without its head, or with it, has the same weights under shorter or longer names.
        return next((k for k in (key, key.removeprefix(prefix), prefix + key) if k in shapes), None)

    for block, matrices in added.items():
        weights = {matrix.weight: (matrix.shape, matrix.columns) for matrix in matrices}
        # Where one set of experts in a block is adapted, others may be needed to know its place.
        inside_block = [layer for layer in layers if layer.path.startswith(block)] if block else []
        mapped = partial(row_maps, skeleton, {**_stacks(inside_block), **weights})
        # The likeliest first; the last is for checkpoints that are in the model's own layout.
        layouts = [
            mapped(),
            mapped(as_saved=False),
            {weight: own_rows(weight, *layout) for weight, layout in weights.items()},
        ]
        for matrix in matrices:
            tried = [places for layout in layouts if (places := layout[matrix.weight].where(matrix.rows))]
            problems = [_why_not(places, matrix, find, shapes) for places in tried]
            if None not in problems:
                raise SieveError(f"the base model's checkpoint {problems[0]}: pass that as base_model")
            for part, inside, chosen in tried[problems.index(None)]:
                key = find(part.key)
                assert key is not None
                edits.setdefault(key, []).append(partial(_add, matrix.delta, part.columns, inside, chosen))
    return edits


def _why_not(
    places: list[tuple[Part, Index, Index]],
    matrix: _Added,
    find: Callable[[str], str | None],
    shapes: dict[str, tuple[int, ...]],
) -> str | None:
    """What keeps a matrix from being added at these places, if anything."""
    for part, _, _ in places:
        key = find(part.key)
        if key is None:
            return (
                f"has no weight {part.key!r}, which the adapter changes, expected the checkpoint of the model that it "
                "was trained on"
            )
        shape = part.whole_shape(matrix.shape[matrix.columns])
        if shapes[key] != shape:
            return (
                f"has a weight of shape {shapes[key]} where the adapter adds {shape} ({key}), expected the checkpoint "
                "of its own base model"
            )
    return None


@dataclass(frozen=True)
class _Added:
    """A matrix that an adapter adds to some rows of a weight.

    Attributes:
        weight: name of it in the model.
        shape, columns: of the weight, and its axis of columns.
        rows: numbers of the rows, in the order of the matrix.
        delta: makes the matrix, (rows, columns).
    """

    weight: str
    shape: tuple[int, ...]
    columns: int
    rows: torch.Tensor
    delta: Callable[[], torch.Tensor]


def _added_by_others(opened: OpenedAdapter) -> Iterator[_Added]:
    for path, layer in opened.other_layers():
        _refuse_tied(opened, path, layer)
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        shape = tuple(layer.get_base_layer().get_parameter(parameter).shape)
        delta = partial(_delta, layer, opened.name)
        yield _Added(f"{path}.{parameter}", shape, 1, torch.arange(shape[0]), delta)


def _added_by_experts(opened: OpenedAdapter) -> Iterator[_Added]:
    moe = {layer.path: layer for layer in opened.moe_layers()}
    for path, adapted in opened.expert_layers().items():
        layer, plan = moe[path], adapted.plans[opened.name]
        if isinstance(layer.family, ModuleExperts):
            names = layer.family.names(layer.experts)
            for projection, expert in itertools.product(plan.ranks, plan.experts):
                size_in, size_out = layer.shape.projections[projection]
                weight = f"{path}.{names[projection, expert]}.weight"
                delta = partial(adapted.get_delta_weight, opened.name, projection, expert)
                yield _Added(weight, (size_out, size_in), 1, torch.arange(size_out), delta)
            continue
        stacks = _stacks([layer])
        numbers = {name: row_numbers(shape, columns) for name, (shape, columns) in stacks.items()}
        for projection, expert in itertools.product(plan.ranks, plan.experts):
            weight = f"{layer.experts_path}.{parameter_of(layer, projection)}"
            rows = matrix_in(layer, numbers[weight], projection, expert)
            delta = partial(adapted.get_delta_weight, opened.name, projection, expert)
            if not torch.equal(rows[:, 0], rows[:, -1]):
                # Rows of the weight are columns of the matrix.
                rows, delta = rows.T, partial(_transposed, delta)
            yield _Added(weight, *stacks[weight], rows[:, 0].long(), delta)


def _stacks(layers: list[MoELayer]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Weight with experts in it -> its shape, and its axis of columns."""
    stacks = {}
    for layer in layers:
        for parameter in [] if isinstance(layer.family, ModuleExperts) else parameters_of(layer):
            shape = tuple(layer.experts.get_parameter(parameter).shape)
            columns = 1 if is_stack(layer, parameter) and is_transposed(layer, parameter) else len(shape) - 1
            stacks[f"{layer.experts_path}.{parameter}"] = shape, columns
    return stacks


def _transposed(delta: Callable[[], torch.Tensor]) -> torch.Tensor:
    return delta().T


def _delta(layer: LoraLayer, name: str) -> torch.Tensor:
    """What a layer of PEFT's own adds to its weight."""
    if isinstance(layer, Embedding):
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    wide = torch.promote_types(a.dtype, torch.float32)
    delta = layer.scaling[name] * (b.detach().cpu().to(wide) @ a.detach().cpu().to(wide))
    return delta.T if isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False) else delta


def _add(
    make_delta: Callable[[], torch.Tensor], columns: int, inside: Index, chosen: Index, weight: torch.Tensor
) -> None:
    """Add chosen rows of a matrix to the rows inside a weight, whose axis of columns is given."""
    rows = weight.movedim(columns, -1)
    delta = make_delta()[chosen]
    wide = torch.promote_types(weight.dtype, delta.dtype)
    rows[inside] = (rows[inside].to(wide) + delta.to(weight.device, wide)).to(weight.dtype)


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
