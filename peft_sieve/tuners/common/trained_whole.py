"""Modules that one adapter trains whole and another one adapts: the model has no place for both, in either order.

PEFT puts a wrapper around what an adapter trains whole (`modules_to_save`, `trainable_token_indices`), which holds a
copy for each adapter that does. Adapter layers in, on or around it would be in the copies of some adapters only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from ...errors import SieveError
from ...moe.topology import standing_modules

_ADVICE = "Load the adapters into base models of their own"


def refuse_adapting(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse to adapt modules that an adapter in the model trains whole.

    Args:
        paths: of the modules in the base model, those left out that the new adapter trains whole itself.

    Raises:
        SieveError: one is such a module, or in one.
    """
    whole = {path: module for path, module in standing_modules(model) if isinstance(module, AuxiliaryTrainingWrapper)}
    for path in paths if whole else ():
        for other, wrapper in whole.items():
            if _is_in(path, other):
                raise SieveError(
                    f"The new adapter adapts {path}, and adapter '{_first(wrapper)}' trains {other} whole "
                    f"({_setting(wrapper)}). {_ADVICE}, or leave the module out with exclude_modules."
                )


def refuse_training_whole(model: nn.Module, configs: Mapping[str, Any], adapter_name: str) -> None:
    """Refuse to train modules whole that an adapter in the model adapts, or of which it trains a part.

    Args:
        configs: of all adapters, the new one included.
        adapter_name: of the new one.

    Raises:
        SieveError: there is one, or not all adapters train tokens of the same embeddings.
    """
    standing = dict(standing_modules(model))
    whole = _trained_whole(model, configs[adapter_name], standing)
    _refuse_tokens(whole["trainable_token_indices"], standing, configs.keys() - {adapter_name})
    for setting, paths in whole.items():
        for path in paths:
            for other, module in standing.items():
                if _conflict(path, setting, other, module):
                    raise SieveError(
                        f"{setting} of the new adapter trains {path} whole, and adapter '{_first(module)}' has weights "
                        f"of its own for {other}. {_ADVICE}."
                    )


def _trained_whole(model: Any, config: Any, standing: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Setting -> paths of what it wraps, found as PEFT finds them."""
    tokens = getattr(config, "trainable_token_indices", None)
    names = {
        "modules_to_save": tuple(getattr(config, "modules_to_save", None) or ()),
        "trainable_token_indices": tuple(tokens) if isinstance(tokens, dict) else (),
    }
    found = {setting: [path for path in standing if path.endswith(ends)] for setting, ends in names.items()}
    if tokens and not isinstance(tokens, dict):
        embeddings = model.get_input_embeddings()
        found["trainable_token_indices"] = [path for path, module in standing.items() if module is embeddings]
    return found


def _refuse_tokens(paths: list[str], standing: Mapping[str, nn.Module], others: Iterable[str]) -> None:
    """PEFT neither saves nor loads an adapter without trained tokens beside one that has some."""
    for path in paths:
        if not hasattr(standing[path], "weight"):
            kind = type(standing[path]).__name__
            raise SieveError(f"trainable_token_indices names {path or 'the model'}, a {kind}, which has no embeddings.")
    held = {path: module for path, module in standing.items() if isinstance(module, TrainableTokensWrapper)}
    for other in others:
        for path in {*paths, *held}:
            if path not in paths or path not in held or other not in held[path]._get_available_adapters():
                raise SieveError(
                    f"Of the new adapter and adapter '{other}' one has trainable_token_indices for {path}, and the "
                    f"other one does not. {_ADVICE}."
                )


def _conflict(path: str, setting: str, other: str, module: nn.Module) -> bool:
    if isinstance(module, AuxiliaryTrainingWrapper):
        # One copy beside another is what wrappers are for.
        return (_is_in(path, other) or _is_in(other, path)) and (path, setting) != (other, _setting(module))
    if not isinstance(module, BaseTunerLayer) or not module._get_available_adapters():
        return False
    return _is_in(path, other) or _is_in(other, path)


def _is_in(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _setting(wrapper: nn.Module) -> str:
    return "modules_to_save" if isinstance(wrapper, ModulesToSaveWrapper) else "trainable_token_indices"


def _first(module: Any) -> str:
    return min(module._get_available_adapters())
