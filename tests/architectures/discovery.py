"""Which model classes of the installed transformers have routed experts: found by looking, not from a list."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

MODELS = Path(transformers.__file__).parent / "models"
_EXPERTS_CLASS = re.compile(r"^class (\w*(?:Experts?|MoE|Moe))\(", re.MULTILINE)
_HEAD = re.compile(r"For[A-Z]\w+$")


@cache
def folders_with_experts() -> frozenset[str]:
    """Folders of transformers/models whose modelling file decorates experts, or has a class that is called so."""
    found = set()
    for path in MODELS.glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "use_experts_implementation" in source or _EXPERTS_CLASS.search(source):
            found.add(path.parent.name)
    return frozenset(found)


def model_classes() -> list[type[PreTrainedModel]]:
    """Every class with a head whose configuration is of such a folder, or by default contains one that is."""
    classes: list[type[PreTrainedModel]] = []
    for folder in sorted({_folder(name) for name in CONFIG_MAPPING_NAMES if _contains_experts(name)}):
        for path in sorted((MODELS / folder).glob("modeling_*.py")):
            module = importlib.import_module(f"transformers.models.{folder}.{path.stem}")
            classes += _with_head(module)
    return classes


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module is one of routed experts as far as its class says, or a block around them."""
    if hasattr(module, "_is_expert_parallel"):
        return True
    name = type(module).__name__
    return _EXPERTS_CLASS.match(f"class {name}(") is not None and "Shared" not in name


def _with_head(module: ModuleType) -> list[type[PreTrainedModel]]:
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    models = [c for c in own if issubclass(c, PreTrainedModel) and _has_forward(c)]
    heads = [c for c in models if _HEAD.search(c.__name__) or issubclass(c, GenerationMixin)]
    # An old name that is kept is a class derived from the new one.
    return [c for c in dict.fromkeys(heads) if not any(other in heads for other in c.__mro__[1:])]


def _has_forward(model_class: type[PreTrainedModel]) -> bool:
    return getattr(model_class.forward, "__name__", "") != "_forward_unimplemented"


def _folder(model_type: str) -> str:
    return model_type_to_module_name(model_type)


def _contains_experts(model_type: str) -> bool:
    if _folder(model_type) in folders_with_experts():
        return True
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # a configuration without defaults contains nothing by default
        return False
    return any(_folder(name) in folders_with_experts() for name in _types(config))


def _types(config: PreTrainedConfig) -> set[str]:
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return {config.model_type}.union(*(_types(value) for value in nested))
