"""The embeddings that an adapter brings along: those of a vocabulary that was resized, or trained beside the adapter.

PEFT saves them under the names of the base model's own weights, and loads them over those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import SieveError
from .skeleton import Maker

# Path of a module in the base model -> its weight.
Embeddings = dict[str, torch.Tensor]


def embedding_modules(base: PreTrainedModel) -> dict[str, Any]:
    """Path -> module with a weight, without what PEFT put around it, of the embeddings at both ends of a model."""
    ends = []
    for get in (base.get_input_embeddings, base.get_output_embeddings):
        with suppress(NotImplementedError, AttributeError):  # a model without such an end
            ends.append(get())
    paths = {id(module): path for path, module in base.named_modules()}
    found = {paths[id(end)].removesuffix(".base_layer"): _bare(end) for end in ends if id(end) in paths}
    return {path: module for path, module in found.items() if isinstance(getattr(module, "weight", None), torch.Tensor)}


def are_tied(skeleton: PreTrainedModel) -> bool:
    """Whether both ends of a model without adapters have one weight. Configurations of parts may say otherwise."""
    modules = embedding_modules(skeleton)
    return len({id(module.weight) for module in modules.values()}) < len(modules)


def embedding_in(tensors: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor | None:
    """The weight of an embedding in the tensors of an adapter, None if it is not there.

    Args:
        prefix: key of the module.
    """
    # The second is that of a module that has factors, too.
    return next((tensors[key] for end in ("", ".base_layer") if (key := f"{prefix}{end}.weight") in tensors), None)


def with_vocabulary_of(make: Maker, tensors: Mapping[str, torch.Tensor], prefix: str) -> Maker:
    """How to make a base model with as many embeddings as the tensors of an adapter have.

    Args:
        make: makes it as its configuration says.
        prefix: what the keys of the tensors have before the base model's names.
    """
    for path, module in embedding_modules(make()).items():
        given = embedding_in(tensors, prefix + path)
        if given is not None and given.dim() and given.shape[0] != module.weight.shape[0]:
            rows = given.shape[0]
            return lambda: _resized(make(), rows)
    return make


def saved_embeddings(base: PreTrainedModel, given: Mapping[str, torch.Tensor]) -> Embeddings:
    """The embeddings among weights of the base model that came with a saved adapter.

    Args:
        given: names in the base model -> tensors.

    Raises:
        SieveError: there is a weight of another kind.
    """
    found: Embeddings = {}
    paths = embedding_modules(base)
    for name, tensor in given.items():
        path = name.removesuffix(".weight").removesuffix(".base_layer")
        if path not in paths or not name.endswith(".weight"):
            raise SieveError(
                f"The adapter holds {name}, a weight of the base model that is not one of its embeddings. Load the "
                "adapter, call merge_and_unload() on the model and save it."
            )
        found[path] = tensor
    return found


def live_embeddings(base: PreTrainedModel, base_name: str) -> Embeddings:
    """The embeddings of a model with an adapter that are not those of its base model.

    They are if the vocabulary has another size than in the base model's configuration, or if they are trainable.

    Args:
        base_name: path or Hub id of the base model, "" if not known.

    Raises:
        SieveError: an adapter is merged into them, or another weight of the base model is trainable, too.
    """
    before, now = _vocabulary_of(base_name, base.config), getattr(base.config.get_text_config(), "vocab_size", None)
    resized = None not in (before, now) and before != now
    modules = embedding_modules(base)
    found = {path: m.weight.detach() for path, m in modules.items() if resized or m.weight.requires_grad}
    for path in found:
        if getattr(base.get_submodule(path), "merged", False):
            raise SieveError(
                f"An adapter is merged into {path}, whose weight belongs to the adapter, too. Call unmerge_adapter() "
                "first."
            )
    known = {id(module.weight) for module in modules.values()}
    for name, weight in _weights_of_base(base):
        if weight.requires_grad and id(weight) not in known:
            raise SieveError(
                f"{name} of the base model is trainable, and an adapter does not hold it. Call merge_and_unload() and "
                "save the model, or freeze it if it was not trained."
            )
    return found


def _weights_of_base(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model that belong to no adapter."""
    yield from ((f"{path}{name}", weight) for name, weight in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        yield from _weights_of_base(_bare(child), f"{path}{name}.")


def _bare(module: nn.Module) -> nn.Module:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _bare(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def _vocabulary_of(name: str, config: PreTrainedConfig) -> int | None:
    """The size of the vocabulary in the configuration of a checkpoint, None if not known."""
    if not name:
        return None
    with suppress(OSError, ValueError):
        part, _ = PreTrainedConfig.get_config_dict(name)
        for inner in path_of_text(part, config):
            part = part.get(inner, {})
        return part.get("vocab_size")
    return None


def path_of_text(content: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Where a configuration has that of the text model.

    Args:
        content: as it is written.
        config: of the model that has the adapter, which may be the text model of a larger one.
    """
    if content.get("model_type", config.model_type) != config.model_type:
        parts = {name: part.get("model_type") for name, part in content.items() if isinstance(part, dict)}
        return [next((name for name, model_type in parts.items() if model_type == config.model_type), "text_config")]
    return _path_inside(config, config.get_text_config()) or []


def _path_inside(config: PreTrainedConfig, wanted: PreTrainedConfig) -> list[str] | None:
    if config is wanted:
        return []
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and (inside := _path_inside(part, wanted)) is not None:
            return [name, *inside]
    return None
