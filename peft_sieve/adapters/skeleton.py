"""The base model of an adapter without its values: made on the meta device from its configuration."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checks import first_line, must_be
from ..errors import SieveError

# Makes the base model without adapters, on the meta device.
Maker = Callable[[], PreTrainedModel]

# By PEFT's task type: the class that the base model is loaded with then.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def skeleton_maker(base_model: Any, config: PeftConfig, paths: list[str]) -> tuple[Maker, str]:
    """How to make the base model on the meta device, and its name.

    Args:
        base_model: the model, its path or Hub id, or None for what `config` names.
        config: of the adapter; says which class the base model was of.
        paths: modules that it must have.

    Raises:
        SieveError: the base model is not named, not found, or has no such modules.
    """
    if isinstance(base_model, nn.Module):
        return maker_like(base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model)
    name = base_model if base_model is not None else config.base_model_name_or_path
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        advice = "The adapter does not name one." if base_model is None else ""
        raise must_be("base_model", "a model, or its path or Hub id", name, advice)
    name = os.fspath(name)
    try:
        # No question on the terminal about code that comes with a checkpoint: it is an error that says what to pass.
        revision = config.revision if base_model is None else None
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise SieveError(
            f"The configuration of the base model {name!r} cannot be read ({first_line(error)}). Pass a path or Hub id "
            "that AutoConfig can load, or the model itself, as base_model."
        ) from error
    tried = []
    for model_class in model_classes(hf_config, config):
        try:
            make = maker_of(model_class, hf_config, name)
            modules = {path for path, _ in make().named_modules()}
        except ValueError:
            # An auto class that does not know this configuration.
            continue
        if modules.issuperset(paths):
            return make, name
        tried.append(model_class.__name__)
    raise SieveError(
        f"The base model {name!r} ({', '.join(tried) or 'of no known class'}) has no module {next(iter(paths), '')!r}. "
        "Pass the one that the adapter was trained on as base_model."
    )


def maker_like(model: nn.Module) -> tuple[Maker, str]:
    """How to make another model like this one on the meta device, and its name, "" if not known.

    Raises:
        SieveError: it is not a model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise SieveError(
            f"The base model must be a model of transformers, got {type(model).__name__}. Its configuration says how "
            "checkpoints name its weights."
        )
    name = str(getattr(model, "name_or_path", "") or "")
    return maker_of(type(model), model.config, name), name


def model_classes(hf_config: PreTrainedConfig, config: PeftConfig) -> list[Any]:
    """What the base model of an adapter may be an instance of, the likeliest first."""
    names = [(transformers, _AUTO_CLASSES[config.task_type])] if config.task_type in _AUTO_CLASSES else []
    mapping = config.auto_mapping or {}
    if str(mapping.get("parent_library", "")).split(".")[0] == "transformers":
        names.append((importlib.import_module(mapping["parent_library"]), mapping["base_model_class"]))
    names += [(transformers, name) for name in getattr(hf_config, "architectures", None) or ()]
    names += [(transformers, "AutoModelForCausalLM")]
    found = [getattr(module, name, None) for module, name in names]
    # An auto class has no configuration of its own, and says itself when it does not know one.
    known = {c: getattr(c, "config_class", None) or PreTrainedConfig for c in found if c is not None}
    return [model_class for model_class, config_class in known.items() if isinstance(hf_config, config_class)]


def maker_of(model_class: Any, config: PreTrainedConfig, name: str) -> Maker:
    """How to make a model of a class on the meta device."""
    # A configuration of quantised weights would ask for its quantiser, and there are no weights here.
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config

    def make() -> PreTrainedModel:
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        with torch.device("meta"):
            model: PreTrainedModel = build(copy.deepcopy(config))
        model.name_or_path = name
        return model.eval()

    return make
