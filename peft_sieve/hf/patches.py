"""What PEFT and transformers do with adapters, where they have no hook for what ours need.

Each wrapper says which hook is missing. Adapters of other methods go straight to the original. Importing twice or
reloading replaces what was there by the same.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft.utils.hotswap
from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.utils import load_peft_weights
from safetensors import safe_open
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from ..errors import SieveError
from ..files import replaced_when_done
from ..moe.placement import computes_on, is_offloaded, left_offloaded
from ..moe.wrappers import innermost
from .adapter_files import check_config_file, explained, finish_interrupted_saves, unmap, weights_file
from .card import add_to_card
from .deletion import delete_adapter
from .hotswap import swap_adapter
from .injection import loading
from .methods import adapters_of_package, has_adapters, method_of
from .optimizers import wrap_optimizers

# How to download, as all loaders call it.
_HUB = ("subfolder", "revision", "cache_dir", "token")


def wrap_peft() -> None:
    """Put the wrappers in place."""
    hotswap: Any = peft.utils.hotswap
    _wrap(PeftModel, "save_pretrained", _save_pretrained)
    _wrap(PeftModel, "create_or_update_model_card", _create_or_update_model_card)
    _wrap(PeftModel, "_upload_modified_files", _upload_modified_files)
    _wrap(PeftConfigMixin, "from_json_file", _from_json_file)
    _wrap(PeftModel, "from_pretrained", _from_pretrained)
    _wrap(PeftModel, "load_adapter", _load_adapter)
    _wrap(PeftAdapterMixin, "load_adapter", _load_adapter_in_transformers)
    _wrap(PeftModel, "delete_adapter", _delete_adapter)
    _wrap(PeftAdapterMixin, "delete_adapter", _delete_adapter_in_transformers)
    _wrap(hotswap, "hotswap_adapter_from_state_dict", _hotswap_adapter_from_state_dict)
    _wrap(hotswap, "prepare_model_for_compiled_hotswap", _prepare_model_for_compiled_hotswap)
    wrap_optimizers()


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


# --- saving ---------------------------------------------------------------------------------------------------------


def _save_pretrained(
    original: Callable[..., Any], self: PeftModel, save_directory: str, *args: Any, **kwargs: Any
) -> Any:
    """Missing: a hook for how files are written. A crash in the middle must leave the previous adapter whole."""
    if not adapters_of_package(self):
        return original(self, save_directory, *args, **kwargs)
    given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
    if not given.get("safe_serialization", True):
        raise SieveError(
            "safe_serialization=False is not supported: adapters are read as safetensors only, never as pickled files."
        )
    if not given.get("is_main_process", True) or os.path.isfile(save_directory):
        return original(self, save_directory, *args, **kwargs)
    with replaced_when_done(save_directory, "adapter") as staging, _card_is_saved():
        card = os.path.join(save_directory, "README.md")
        if os.path.isfile(card):  # PEFT updates the one that it finds
            shutil.copyfile(card, os.path.join(staging, "README.md"))
        result = original(self, staging, *args, **kwargs)
        for name, _, method in adapters_of_package(self):
            weights = weights_file(Path(staging, "" if name == "default" else name))
            if weights is not None:
                with safe_open(weights, "pt") as file:
                    method.model.check_whole(self.get_base_model(), name, file.keys())  # type: ignore[attr-defined]
        return result


_saving: ContextVar[bool] = ContextVar("_saving", default=False)


@contextmanager
def _card_is_saved() -> Iterator[None]:
    """In the block, a card is made for a saved adapter; everywhere else for the Hub, as by `Trainer.push_to_hub`."""
    token = _saving.set(True)
    try:
        yield
    finally:
        _saving.reset(token)


def _create_or_update_model_card(original: Callable[..., Any], self: PeftModel, output_dir: str) -> Any:
    """Missing: a hook for what a method has to say in the card."""
    result = original(self, output_dir)
    if adapters_of_package(self):
        add_to_card(self, os.path.join(output_dir, "README.md"), for_hub=not _saving.get())
    return result


def _upload_modified_files(
    original: Callable[..., Any], self: PeftModel, folder: str, *args: Any, **kwargs: Any
) -> Any:
    """Missing: a hook between the card of the repository, which transformers' `push_to_hub` writes over ours, and its
    upload."""
    if adapters_of_package(self):
        self.create_or_update_model_card(folder)
    return original(self, folder, *args, **kwargs)


# --- loading --------------------------------------------------------------------------------------------------------


def _from_json_file(original: Callable[..., Any], cls: type, path_json_file: str, **kwargs: Any) -> Any:
    """Missing: a hook of the method, which is known only once this file was read."""
    check_config_file(path_json_file)
    return original(cls, path_json_file, **kwargs)


def _from_pretrained(original: Callable[..., Any], cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Missing: a hook around injection and loading together, which belong together when weights are refused."""

    def is_ours() -> bool:
        given = inspect.signature(original).bind(cls, model, *args, **kwargs).arguments
        return _is_ours(given["model_id"], given.get("config"), given.get("kwargs", {}))

    placed = _placed_as_it_is(model, is_ours) if "hf_device_map" in vars(innermost(model)) else nullcontext()
    with placed, loading(values_follow=True):
        return original(cls, model, *args, **kwargs)


def _load_adapter(original: Callable[..., Any], self: PeftModel, model_id: str, *args: Any, **kwargs: Any) -> Any:
    """Missing: as for `from_pretrained`, and a hook for where loaded tensors are put."""
    if not adapters_of_package(self):
        return original(self, model_id, *args, **kwargs)
    given = inspect.signature(original).bind(self, model_id, *args, **kwargs).arguments
    folder = os.path.join(model_id, kwargs.get("subfolder") or "")
    placed = _placed_as_it_is(self.get_base_model(), lambda: True)
    with placed, loading(values_follow=True), explained(folder):
        # An adapter that is there already gets weights without its configuration being read.
        finish_interrupted_saves(folder)
        result = original(self, model_id, *args, **kwargs)
        if given.get("low_cpu_mem_usage"):  # PEFT hands out what it mapped then
            unmap(self, given["adapter_name"])
    return result


def _load_adapter_in_transformers(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Missing: a hook for checking what is loaded, which transformers assigns without asking."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    if _is_swap(self, given):
        return _swap_in_transformers(self, given)
    path = given.get("peft_model_id") or "the state dict"
    source = (path, given.get("peft_config"), given.get("adapter_kwargs") or {})
    with _placed_as_it_is(self, lambda: _is_ours(*source), told=True), loading() as current:
        with explained(path, lambda: bool(current.injected)):
            loaded = original(self, *args, **kwargs)
        for injection in current.injected:
            unmap(self, injection.adapter_name)
            keys = getattr(loaded, "missing_keys", ()), getattr(loaded, "unexpected_keys", ())
            injection.tuner.check_loaded(self, injection.adapter_name, *keys)
    return loaded


def _is_ours(model_id: Any, config: Any, download: Mapping[str, Any]) -> bool:
    if config is not None:
        return method_of((config if isinstance(config, Mapping) else vars(config)).get("peft_type")) is not None
    hub = {name: download[name] for name in _HUB if name in download}
    try:
        return method_of(PeftConfig._get_peft_type(model_id, **hub)) is not None
    except (ValueError, KeyError):
        return False  # which the loader says better


def _placed_as_it_is(model: Any, is_ours: Callable[[], bool], told: bool = False) -> AbstractContextManager[None]:
    """Within it, loading one of our adapters leaves an offloaded model's weights where they are.

    Args:
        is_ours: asked only if the model is offloaded.
        told: whether the loader wants to know where the model computes.
    """
    if not is_offloaded(model) or not is_ours():
        return nullcontext()
    return left_offloaded(model, computes_on(model) if told else None)


# --- deleting -------------------------------------------------------------------------------------------------------


def _delete_adapter(original: Callable[..., Any], self: PeftModel, adapter_name: str) -> Any:
    """Missing: the name that a `PeftModel` keeps for itself follows only where one adapter is left active."""
    ours = has_adapters(self)
    result = original(self, adapter_name)
    if ours and self.active_adapter == adapter_name:
        self.active_adapter = next(iter(self.active_adapters), [])  # type: ignore[assignment]
    return result


def _delete_adapter_in_transformers(original: Callable[..., Any], self: Any, adapter_names: list[str] | str) -> Any:
    """Missing: a hook of the tuner, which transformers does not keep."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if has_adapters(self) and set(names) <= set(self.peft_config):
        for name in names:
            method = method_of(self.peft_config[name])
            left = {known: config for known, config in self.peft_config.items() if known == name or known not in names}
            if method is not None:
                delete_adapter(self, name, self.active_adapters(), left, method.model.tuner_layer_cls)
    return original(self, adapter_names)


# --- hot-swapping ---------------------------------------------------------------------------------------------------


def _hotswap_adapter_from_state_dict(
    original: Callable[..., Any], model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Missing: a hook for checking, and for what is swapped beside factors: other parameters, the configuration."""
    method = method_of(config)
    if method is None or method.check_hotswap is None:
        return original(model, state_dict, adapter_name, config, *args, **kwargs)
    return swap_adapter(model, method, adapter_name, config, state_dict)


def _is_swap(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether transformers' `load_adapter` is to swap one of our adapters, which it does for LoRA alone."""
    asked, name = given.get("hotswap", "auto"), given.get("adapter_name")
    held = method_of(getattr(model, "peft_config", {}).get(name))
    wanted = getattr(model, "_hotswap_enabled", False) if asked == "auto" else asked
    return bool(wanted) and held is not None and held.check_hotswap is not None


def _swap_in_transformers(model: Any, given: Mapping[str, Any]) -> LoadStateDictInfo:
    path: Any = given.get("peft_model_id")
    name = given["adapter_name"]
    download = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
    download = {key: download[key] for key in (*_HUB, "force_download") if key in download}
    if given.get("local_files_only"):
        download["local_files_only"] = True
    config, weights = given.get("peft_config"), given.get("adapter_state_dict")
    with explained(path):
        config = PeftConfig.from_pretrained(path, **download) if config is None else config
        weights = load_peft_weights(path, device="cpu", **download) if weights is None else weights
    method = method_of(model.peft_config[name])
    assert method is not None
    swap_adapter(model, method, name, config, weights)
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    return LoadStateDictInfo(**{field.name: empty.get(field.name, set()) for field in fields(LoadStateDictInfo)})


def _prepare_model_for_compiled_hotswap(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Missing: a hook for layers that cannot be prepared."""
    if has_adapters(model):
        raise SieveError(
            "prepare_model_for_compiled_hotswap is not supported for adapters of this package, which run outside "
            "compiled graphs. Leave the call out: adapters of one rank are swapped without it."
        )
    return original(model, *args, **kwargs)
