"""The one place that touches PEFT: its registry of methods, and some of its methods that offer no hook.

Each of these does for a sieve adapter what it cannot do from outside, and calls the original unchanged for every
other method. Importing twice or reloading replaces what was there by the same.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import peft.mapping
import peft.utils.hotswap
from peft import PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from ..errors import SieveError
from ..files import replaced_when_done

# Methods whose adapters belong to a mask of experts: what is wrapped below is wrapped for them.
SIEVE_TYPES = ("SIEVE_LORA", "SIEVE_EPNG")
PEFT_TYPES = (*SIEVE_TYPES, "PERFT", "LORA_MOE")


def add_peft_types() -> None:
    """Add our methods to PEFT's closed enumeration.

    A plain string would do for PEFT, but not for transformers' `load_adapter`, which asks for `.value`.
    """
    for name in PEFT_TYPES:
        if name in PeftType.__members__:
            continue
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        # Python 3.11 and later look members up as class attributes first.
        type.__setattr__(PeftType, name, member)


def register(peft_type: str, config_cls: type, model_cls: type) -> None:
    """Enter a method in PEFT's tables."""
    method = PeftType(peft_type)
    # Not register_peft_method: it refuses a prefix that another method has, and ours is LoRA's on purpose.
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_cls
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[method] = model_cls
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[method] = model_cls.prefix  # type: ignore[attr-defined]
    if peft_type in SIEVE_TYPES:
        swap = peft.utils.hotswap
        swap.CONFIG_KEYS_TO_CHECK[method] = swap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]


def wrap_peft() -> None:
    """Put the wrappers in place."""
    swap = peft.utils.hotswap
    _wrap(swap, "hotswap_adapter_from_state_dict", _hotswap_adapter_from_state_dict)
    _wrap(swap, "prepare_model_for_compiled_hotswap", _prepare_model_for_compiled_hotswap)
    _wrap(PeftModel, "save_pretrained", _save_pretrained)
    _wrap(PeftModel, "create_or_update_model_card", _create_or_update_model_card)
    _wrap(PeftModel, "from_pretrained", _from_pretrained)
    _wrap(PeftModel, "load_adapter", _load_adapter)
    _wrap(PeftModel, "_upload_modified_files", _upload_modified_files)
    _wrap(PeftAdapterMixin, "load_adapter", _load_adapter_in_transformers)
    _wrap(PeftConfigMixin, "from_json_file", _from_json_file)
    _wrap(PeftAdapterMixin, "add_adapter", _add_adapter_in_transformers)
    for model_type in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        for name, wrapper in (("__init__", _init), ("add_adapter", _add_adapter)):
            if name in vars(model_type):
                _wrap(model_type, name, wrapper)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by `wrapper(original, ...)`, once: a second call wraps the same original."""
    current = inspect.getattr_static(owner, name)
    as_function = current.__func__ if isinstance(current, classmethod) else current
    original = getattr(as_function, "_peft_sieve_original", as_function)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement._peft_sieve_original = original  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(replacement) if isinstance(current, classmethod) else replacement)


def _has_sieve(model: PeftModel) -> bool:
    return any(config.peft_type in SIEVE_TYPES for config in model.peft_config.values())


def _is_of_this_package(model: PeftModel) -> bool:
    """Whether it has an adapter of a method of this package."""
    return any(config.peft_type in PEFT_TYPES for config in model.peft_config.values())


def _save_pretrained(
    original: Callable[..., Any], self: PeftModel, save_directory: str, *args: Any, **kwargs: Any
) -> Any:
    """A crash in the middle of a save must leave the previous adapter whole."""
    if _has_sieve(self) and not kwargs.get("safe_serialization", args[0] if args else True):
        raise SieveError(
            "safe_serialization is False, expected True, since adapters are read as safetensors only and never as "
            "pickled files: leave it out"
        )
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
    if _is_of_this_package(self):
        from ..adapters.model_card import add_to_card

        add_to_card(self, os.path.join(output_dir, "README.md"))
    return result


def _upload_modified_files(
    original: Callable[..., Any], self: PeftModel, folder: str, *args: Any, **kwargs: Any
) -> Any:
    """`push_to_hub` of transformers writes the card of the repository over ours: put our section into that."""
    if _is_of_this_package(self):
        self.create_or_update_model_card(folder)
    return original(self, folder, *args, **kwargs)


def _from_pretrained(original: Callable[..., Any], cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
    from ..tuners.common.loading import with_weights_to_follow

    given = inspect.signature(original).bind(cls, model, *args, **kwargs).arguments
    placed = _placed_as_it_is(model, lambda: _is_ours(given["model_id"], given.get("config"), given.get("kwargs", {})))
    with _as_before_on_error(model), with_weights_to_follow(), placed:
        return original(cls, model, *args, **kwargs)


def _init(original: Callable[..., Any], self: PeftModel, *args: Any, **kwargs: Any) -> None:
    """What `get_peft_model` makes: a setting that fails late must not leave half an adapter behind."""
    from ..tuners.common.names import check_not_there

    given = inspect.signature(original).bind(self, *args, **kwargs)
    given.apply_defaults()
    model, config = given.arguments["model"], given.arguments["peft_config"]
    if getattr(config, "peft_type", None) not in PEFT_TYPES or not isinstance(model, nn.Module):
        return original(self, *args, **kwargs)
    check_not_there(given.arguments["adapter_name"], model)
    with _as_before_on_error(model):
        return original(self, *args, **kwargs)


def _add_adapter(original: Callable[..., Any], self: PeftModel, *args: Any, **kwargs: Any) -> None:
    with _as_before_on_error(self) if _is_of_this_package(self) else nullcontext():
        return original(self, *args, **kwargs)


def _add_adapter_in_transformers(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    config = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("adapter_config")
    with _as_before_on_error(self) if getattr(config, "peft_type", None) in PEFT_TYPES else nullcontext():
        return original(self, *args, **kwargs)


def _placed_as_it_is(model: Any, is_ours: Callable[[], bool], told: bool = False) -> AbstractContextManager[None]:
    """Within it, loading one of our adapters leaves an offloaded model's weights where they are.

    Args:
        is_ours: asked only if the model is offloaded.
        told: whether the loader wants to know where the model computes.
    """
    from ..moe.placement import computes_on, is_offloaded, left_offloaded

    if not is_offloaded(model) or not is_ours():
        return nullcontext()
    return left_offloaded(model, computes_on(model) if told else None)


@contextmanager
def _as_before_on_error(model: Any) -> Iterator[None]:
    """When weights are refused, the adapters that were to have them are not left in the model."""
    from ..tuners.common import undo as sieve
    from ..tuners.lora_moe import undo as lora_moe
    from ..tuners.perft import undo as perft

    with sieve.as_before_on_error(model), perft.as_before_on_error(model), lora_moe.as_before_on_error(model):
        yield


def _is_ours(model_id: Any, config: Any, download: Mapping[str, Any]) -> bool:
    if config is not None:
        return (config if isinstance(config, Mapping) else vars(config)).get("peft_type") in SIEVE_TYPES
    hub = {name: download[name] for name in ("subfolder", "revision", "cache_dir", "token") if name in download}
    try:
        return PeftConfig._get_peft_type(model_id, **hub) in SIEVE_TYPES
    except (ValueError, KeyError):
        return False  # which the loader says better


def _load_adapter(original: Callable[..., Any], self: PeftModel, model_id: str, *args: Any, **kwargs: Any) -> Any:
    from ..tuners.common.loading import explained, finish_interrupted_saves, unmap, with_weights_to_follow

    folder = os.path.join(model_id, kwargs.get("subfolder") or "")
    placed = _placed_as_it_is(self.get_base_model(), lambda: _has_sieve(self))
    with _as_before_on_error(self), with_weights_to_follow(), placed:
        try:
            # An adapter that is there already gets weights without its configuration being read.
            finish_interrupted_saves(folder)
            result = original(self, model_id, *args, **kwargs)
        except Exception as error:
            if not _is_of_this_package(self) or explained(error, folder) is error:
                raise
            raise explained(error, folder) from error
        given = inspect.signature(original).bind(self, model_id, *args, **kwargs).arguments
        if _has_sieve(self) and given.get("low_cpu_mem_usage"):
            # PEFT hands out what it mapped then.
            unmap(self, given["adapter_name"])
    return result


def _load_adapter_in_transformers(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from ..tuners.common.loading import check_loaded, explained, unmap
    from ..tuners.lora_moe.loading import check_loaded as check_lora_moe
    from ..tuners.perft.loading import check_loaded as check_perft

    before = set(getattr(self, "peft_config", {}))
    checks = {**dict.fromkeys(SIEVE_TYPES, check_loaded), "PERFT": check_perft, "LORA_MOE": check_lora_moe}

    def new() -> dict[str, Any]:
        configs = getattr(self, "peft_config", {})
        return {name: config for name, config in configs.items() if name not in before}

    def ours() -> list[str]:
        return [name for name, config in new().items() if config.peft_type in SIEVE_TYPES]

    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    source = (given.get("peft_model_id"), given.get("peft_config"), given.get("adapter_kwargs") or {})
    with _as_before_on_error(self), _placed_as_it_is(self, lambda: _is_ours(*source), told=True):
        try:
            loaded = original(self, *args, **kwargs)
        except Exception as error:
            path = kwargs.get("peft_model_id") or (args[0] if args else None) or "the state dict"
            if not checks.keys() & {config.peft_type for config in new().values()} or explained(error, path) is error:
                raise
            raise explained(error, path) from error
        for name in ours():
            unmap(self, name)
        for name, config in new().items():
            if check := checks.get(config.peft_type):
                check(self, name, getattr(loaded, "missing_keys", ()), getattr(loaded, "unexpected_keys", ()))
    return loaded


def _hotswap_adapter_from_state_dict(
    original: Callable[..., Any], model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Values are swapped where they are, so they must belong to the same experts."""
    if config.peft_type in SIEVE_TYPES:
        from ..tuners.common.loading import check_hotswap

        check_hotswap(model, adapter_name, config, state_dict)
    return original(model, state_dict, adapter_name, config, *args, **kwargs)


def _prepare_model_for_compiled_hotswap(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    from ..tuners.common.loading import sieve_layers

    if sieve_layers(model):
        raise SieveError(
            "prepare_model_for_compiled_hotswap was called for adapters on experts, expected no preparation, since "
            "those run outside compiled graphs and only adapters of one rank are swapped: leave the call out"
        )
    return original(model, *args, **kwargs)


def _from_json_file(original: Callable[..., Any], cls: type, path_json_file: str, **kwargs: Any) -> Any:
    from ..tuners.common.loading import read_config_file

    read_config_file(path_json_file)
    return original(cls, path_json_file, **kwargs)
