"""The way back when an adapter was put into a model, and then its weights turned out wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .exact_unmerge import ExactLinear, ExactParamWrapper
from .experts.layer import SieveExpertLayer
from .hooks import take_down

_OURS = (SieveExpertLayer, ExactLinear, ExactParamWrapper)
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@contextmanager
def as_before_on_error(model: nn.Module) -> Iterator[None]:
    """When the block ends with an exception, take out the sieve adapters that came into `model` during it.

    Its modules, its other adapters, and what is trainable are as before then. Adapters of other methods are PEFT's
    business.
    """
    try:
        with taken_out_on_error(model, _OURS):
            yield
    except Exception:
        if not any(isinstance(module, SieveExpertLayer) for module in model.modules()):
            for module in model.modules():
                take_down(module)
        raise


@contextmanager
def taken_out_on_error(model: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """When the block ends with an exception, take out what wraps modules of `model` since it began.

    Only if a layer of `layer_types` is new, or has an adapter that is.
    """
    adapters, wrappers = _adapters(model), {id(module) for module in model.modules() if isinstance(module, _WRAPPERS)}
    trainable = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    attributes = {name: vars(model)[name] for name in ATTRIBUTES if name in vars(model)}
    try:
        yield
    except Exception:
        new = [path for path, m in _outer_wrappers(model) if id(m) not in wrappers]
        names = _adapters(model) - adapters
        layers = [m for m in model.modules() if isinstance(m, layer_types)]
        if any(id(m) not in wrappers or names & _held(m) for m in layers):
            _take_out(model, new, names)
            restore(model, trainable, attributes, names)
        raise


def _outer_wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    """Wrappers and their paths; what is inside one of PEFT's auxiliary ones goes with it."""
    modules = list(model.named_modules())
    auxiliary = tuple(f"{path}." for path, m in modules if isinstance(m, AuxiliaryTrainingWrapper))
    return [(path, m) for path, m in modules if isinstance(m, _WRAPPERS) and not path.startswith(auxiliary)]


# What PEFT and transformers set on a model that takes adapters.
ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


def _held(layer: Any) -> set[str]:
    return layer._get_available_adapters()


def _adapters(model: nn.Module) -> set[str]:
    return {name for module in model.modules() if isinstance(module, BaseTunerLayer) for name in _held(module)}


def _take_out(model: nn.Module, new_wrappers: list[str], names: set[str]) -> None:
    # The inner ones first: one wrapper may be around another.
    for path in reversed(new_wrappers):
        unwrap(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            delete_adapter(model, adapter_name=name, prefix="lora_")


def unwrap(model: nn.Module, path: str) -> None:
    """Put back what the wrapper at `path` is around."""
    parent, _, name = _get_submodules(model, path)
    wrapper: Any = getattr(parent, name)
    # PEFT's own unloading would leave the copy that is trained, in place of what it was copied from.
    auxiliary = isinstance(wrapper, AuxiliaryTrainingWrapper)
    setattr(parent, name, wrapper.original_module if auxiliary else wrapper.get_base_layer())


def restore(model: nn.Module, trainable: dict[int, bool], attributes: dict[str, Any], names: set[str]) -> None:
    """Put back what is trainable (by id of the parameter) and the attributes, and forget the adapters `names`."""
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), parameter.requires_grad))
    for name in names:
        getattr(model, "peft_config", {}).pop(name, None)
    for attribute in ATTRIBUTES:
        if attribute in attributes:
            setattr(model, attribute, attributes[attribute])
        else:
            vars(model).pop(attribute, None)
