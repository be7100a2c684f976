"""The methods of this package: what PEFT, and what is wrapped around it, have to know of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft.mapping
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from torch import nn


@dataclass(frozen=True)
class Method:
    """One method; `register` makes it known.

    Attributes:
        name: its PEFT type, the `peft_type` of its configurations.
        config: its configurations.
        model: its tuner, derived from `tuners.common.tuner.MethodTuner`.
        title: what its adapters are called in the title of a model card, such as "Sparse LoRA".
        tags: of its model cards.
        describe: (model, adapter name, configuration) -> the section of a model card, Markdown; None for a short one.
        key_parts: words in its saved keys that are not attributes of its layers, and so cannot be names of adapters.
        only_keys: parts of keys that no method of another package has. A configuration file that was cut short is told
            by the weights beside it.
        only_fields: fields that only its configurations have, by which a file with another `peft_type` is told.
        sizes: (setting, how the keys of tensors end that have as many rows). A damaged setting could ask for more
            memory than there is, so it is compared with the weights before a layer is made; `r` always is.
        check_files: (configuration as read, its folder) -> None: refuses weights that do not belong beside it.
        check_hotswap: (model, adapter name, configuration, weights) -> None: refuses weights that cannot take the place
            of an adapter's; None where hot-swapping is not supported.
    """

    name: str
    config: type[PeftConfig]
    model: type[BaseTuner]
    title: str
    tags: tuple[str, ...] = ()
    describe: Callable[[Any, str, Any], str] | None = None
    key_parts: tuple[str, ...] = ()
    only_keys: tuple[str, ...] = ()
    only_fields: tuple[str, ...] = ()
    sizes: tuple[tuple[str, str], ...] = ()
    check_files: Callable[[Mapping[str, Any], Path], None] | None = None
    check_hotswap: Callable[[nn.Module, str, Any, Mapping[str, Any]], None] | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known to PEFT and to this package, or replace the one of its name.

    From then on its adapters are saved whole or not at all, checked when they are loaded, described in model cards, and
    taken back after an error.
    """
    peft_type = _enumerated(method.name)
    # Not register_peft_method, which refuses a prefix that another method has: transformers and TRL want LoRA's.
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = method.config
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = method.model
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = method.model.prefix
    if method.check_hotswap is not None:
        hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]
    _METHODS[method.name] = method


def _enumerated(name: str) -> PeftType:
    """The member of PEFT's closed enumeration, added if it is new.

    A plain string would do for PEFT, but not for transformers' `load_adapter`, which asks for `.value`.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        # Python 3.11 and later look members up as class attributes first.
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


def methods() -> list[Method]:
    """All methods, in the order in which they were registered."""
    return list(_METHODS.values())


def method_of(peft_type: Any) -> Method | None:
    """The method of a PEFT type, or of a configuration; None if it is not one of this package."""
    peft_type = getattr(peft_type, "peft_type", peft_type)
    return _METHODS.get(str(getattr(peft_type, "value", peft_type)))


def adapters_of_package(model: Any) -> list[tuple[str, Any, Method]]:
    """(name, configuration, method) of the adapters in a `PeftModel` that are of this package."""
    found = ((name, config, method_of(config)) for name, config in model.peft_config.items())
    return [(name, config, method) for name, config, method in found if method is not None]


def has_adapters(model: Any) -> bool:
    """Whether adapters of this package are in a model, of whatever class."""
    return any(method_of(config) is not None for config in getattr(model, "peft_config", {}).values())


def layer_words(tuners: Iterable[type[BaseTuner]]) -> set[str]:
    """What the layers of tuners call that which holds adapters by their names."""
    layers: list[Any] = [tuner.tuner_layer_cls for tuner in tuners]
    return {name for layer in layers for name in (*layer.adapter_layer_names, *layer.other_param_names)}
