"""The one place that touches PEFT: its registry of methods, and four of its methods that offer no hook.

Each of the four does for a sieve adapter what it cannot do from outside, and calls the original unchanged for every
other method. Importing twice or reloading replaces what was there by the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import peft.mapping
from peft import PeftModel, PeftType
from peft.config import PeftConfigMixin
from safetensors import SafetensorError

from .files import replaced_when_done

PEFT_TYPE = "SIEVE_LORA"


def add_peft_type() -> None:
    """Add the member SIEVE_LORA to PEFT's closed enumeration of methods.

    A plain string would do for PEFT, but not for transformers' `load_adapter`, which asks for `.value`.
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._value2member_map_[PEFT_TYPE] = member
    # Python 3.11 and later look members up as class attributes first.
    type.__setattr__(PeftType, PEFT_TYPE, member)


def register(config_cls: type, model_cls: type) -> None:
    """Enter the method in PEFT's tables, and put the four wrappers in place."""
    method = PeftType(PEFT_TYPE)
    # Not register_peft_method: it refuses a prefix that another method has, and ours is LoRA's on purpose.
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_cls
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[method] = model_cls
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[method] = model_cls.prefix  # type: ignore[attr-defined]
    _wrap(PeftModel, "save_pretrained", _save_pretrained)
    _wrap(PeftModel, "create_or_update_model_card", _create_or_update_model_card)
    _wrap(PeftModel, "load_adapter", _load_adapter)
    _wrap(PeftConfigMixin, "from_json_file", _from_json_file)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by `wrapper(original, ...)`, once: a second call wraps the same original."""
    current = owner.__dict__[name]
    as_function = current.__func__ if isinstance(current, classmethod) else current
    original = getattr(as_function, "_peft_sieve_original", as_function)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement._peft_sieve_original = original  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(replacement) if isinstance(current, classmethod) else replacement)


def _has_sieve(model: PeftModel) -> bool:
    return any(config.peft_type == PEFT_TYPE for config in model.peft_config.values())


def _save_pretrained(
    original: Callable[..., Any], self: PeftModel, save_directory: str, *args: Any, **kwargs: Any
) -> Any:
    """A crash in the middle of a save must leave the previous adapter whole."""
    is_main_process = kwargs.get("is_main_process", args[3] if len(args) > 3 else True)
    if not _has_sieve(self) or not is_main_process or os.path.isfile(save_directory):
        return original(self, save_directory, *args, **kwargs)
    with replaced_when_done(save_directory) as staging:
        _carry_over_card(save_directory, staging)
        return original(self, staging, *args, **kwargs)


def _carry_over_card(save_directory: str, staging: str) -> None:
    """PEFT updates the model card that it finds; let it find the one that is there."""
    card = os.path.join(save_directory, "README.md")
    if os.path.isfile(card):
        with (
            open(card, encoding="utf-8") as source,
            open(os.path.join(staging, "README.md"), "w", encoding="utf-8") as to,
        ):
            to.write(source.read())


def _create_or_update_model_card(original: Callable[..., Any], self: PeftModel, output_dir: str) -> Any:
    result = original(self, output_dir)
    if _has_sieve(self):
        from .interop.model_card import add_to_card

        add_to_card(self, os.path.join(output_dir, "README.md"))
    return result


def _load_adapter(original: Callable[..., Any], self: PeftModel, model_id: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(self, model_id, *args, **kwargs)
    except SafetensorError as error:
        if not _has_sieve(self):
            raise
        from .tuners.sieve.loading import broken_weights

        raise broken_weights(model_id, error) from error


def _from_json_file(original: Callable[..., Any], cls: type, path_json_file: str, **kwargs: Any) -> Any:
    from .tuners.sieve.loading import read_config_file

    read_config_file(path_json_file)
    return original(cls, path_json_file, **kwargs)
