"""Plain LoRA of a text model that was loaded from the checkpoint of a larger model, one that sees for instance.

PEFT finds factors by the names that modules have in a model, and they have others in the larger one, which servers load
from that checkpoint. A file with both names does for both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig
from transformers import AutoConfig, PreTrainedModel

from ..reading import KEY_PREFIX, lora_layers
from ..skeleton import Maker, maker_of, model_classes
from ..vocabulary import embedding_modules, with_vocabulary_of
from .layouts import PlainLora, check_loadable, injected
from .naming import fewest_words


@dataclass(frozen=True)
class LargerModel:
    """The model that a text model is a part of.

    Attributes:
        name: of its class.
        new_skeleton: makes it on the meta device.
        renamed: name in the text model -> name here.
    """

    name: str
    new_skeleton: Maker
    renamed: Callable[[str], str]


def larger_model(base: PreTrainedModel, base_name: str, new_skeleton: Maker) -> LargerModel | None:
    """The model that a base model's checkpoint is for, if that is a larger one; None if not, or not known.

    Args:
        base: the base model, with or without adapters.
        base_name: path or Hub id of its checkpoint.
        new_skeleton: makes it without adapters.
    """
    own = base.config.model_type
    if not base_name:
        return None
    with suppress(OSError, ValueError, KeyError):
        config = AutoConfig.from_pretrained(base_name, trust_remote_code=False)
        if config.model_type != own and config.get_text_config().model_type == own:
            for model_class in model_classes(config, PeftConfig()):
                make = maker_of(model_class, config, base_name)
                model, text = make(), new_skeleton()
                if renamed := _names_in(model, text):
                    embeddings = {f"{renamed(path)}.weight": m.weight for path, m in embedding_modules(text).items()}
                    return LargerModel(type(model).__name__, with_vocabulary_of(make, embeddings, ""), renamed)
    return None


def without_larger(tensors: dict[str, torch.Tensor], larger: LargerModel | None) -> dict[str, torch.Tensor]:
    """The tensors of a plain LoRA without those that are there once more, under the names of a larger model."""
    if larger is None:
        return tensors
    pairs = {key: KEY_PREFIX + larger.renamed(key.removeprefix(KEY_PREFIX)) for key in tensors}
    twice = {
        there
        for key, there in pairs.items()
        if there != key and there in tensors and torch.equal(tensors[key], tensors[there])
    }
    return {key: value for key, value in tensors.items() if key not in twice}


def for_both(plain: PlainLora, larger: LargerModel) -> PlainLora:
    """A plain LoRA with its tensors under the names of a larger model, too.

    Raises:
        SieveError: PEFT would not find a place for all of them there.
    """
    there = {KEY_PREFIX + larger.renamed(key.removeprefix(KEY_PREFIX)): made for key, made in plain.tensors.items()}
    if not plain.for_peft:
        return replace(plain, tensors=plain.tensors | there)
    config = copy.deepcopy(plain.config)
    model = larger.new_skeleton()
    modules = {path for path, _ in model.named_modules()}
    adapted = {
        path.replace(".base_layer", "") for path, _ in lora_layers(injected(config, model).get_base_model(), "default")
    }
    strange = {path for path in adapted if not any(key.startswith(f"{KEY_PREFIX}{path}.") for key in there)}
    if strange:  # layers of the larger model that are called like those of the text model
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *fewest_words(strange, modules)})
    check_loadable(PlainLora(config, there), larger.new_skeleton(), "")
    return replace(plain, config=config, tensors=plain.tensors | there)


def _names_in(larger: PreTrainedModel, text: PreTrainedModel) -> Callable[[str], str] | None:
    """How names of a text model become those of a model that it, or its base model, is a part of; None if it is not."""
    inner, head = type(text), f"{text.base_model_prefix}."
    for path, module in larger.named_modules():
        if path and type(module) is inner:
            return lambda name: f"{path}.{name}"
        if path and type(module) is type(text.base_model):
            return lambda name: f"{path}.{name.removeprefix(head)}" if name.startswith(head) else name
    return None
