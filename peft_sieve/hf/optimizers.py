"""PEFT's functions that make optimizers, which tell an adapter's two factors by LoRA's names of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import peft.optimizers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer

from ..errors import SieveError
from .methods import has_adapters


def wrap_optimizers() -> None:
    """Put the wrappers in place."""
    _wrap_in_place(peft.optimizers.create_loraplus_optimizer, _create_loraplus_optimizer)
    _wrap_in_place(peft.optimizers.create_lorafa_optimizer, partial(_refuse, "LoRA-FA (create_lorafa_optimizer)"))
    riemannian = getattr(peft.optimizers, "create_riemannian_optimizer", None)
    if riemannian is not None:
        _wrap_in_place(riemannian, partial(_refuse, "Riemannian preconditioning (create_riemannian_optimizer)"))


def _call(*args: Any, _wrapper: Any, **kwargs: Any) -> Any:
    return _wrapper(*args, **kwargs)


def _wrap_in_place(function: Any, wrapper: Callable[..., Any]) -> None:
    """Have a function call `wrapper(original, ...)`, once: a second call wraps the same original.

    The function stays the same object: a script may have imported it before this package.
    """
    if not hasattr(function, "_peft_sieve_original"):
        original = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        original.__kwdefaults__ = function.__kwdefaults__
        function._peft_sieve_original = function.__wrapped__ = original
        function.__code__, function.__defaults__ = _call.__code__, None
    function.__kwdefaults__ = {"_wrapper": partial(wrapper, function._peft_sieve_original)}


def _create_loraplus_optimizer(original: Callable[..., Optimizer], model: Any, *args: Any, **kwargs: Any) -> Optimizer:
    """Missing: a hook that says which factors are B. PEFT looks for `lora_B` in names."""
    optimizer = original(model, *args, **kwargs)
    if has_adapters(model):
        second = {id(parameter) for parameter in second_factors(model)}
        with_a, _, with_b, _ = optimizer.param_groups
        given = with_a["params"]
        with_a["params"] = [parameter for parameter in given if id(parameter) not in second]
        with_b["params"] += [parameter for parameter in given if id(parameter) in second]
    return optimizer


def _refuse(what: str, original: Callable[..., Optimizer], model: Any, *args: Any, **kwargs: Any) -> Optimizer:
    """Missing: a hook for packed factors, which PEFT would pair by order or name, or leave out."""
    if has_adapters(model):
        raise SieveError(
            f"{what} is not supported for adapters of this package. Use create_loraplus_optimizer or an optimizer of "
            "torch."
        )
    return original(model, *args, **kwargs)


def second_factors(model: nn.Module) -> list[nn.Parameter]:
    """The factors of adapters of this package that LoRA would call B: those on the side of the output."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    names = [(layer, name) for layer in layers for name in getattr(layer, "second_factor_names", ())]
    return [parameter for layer, name in names for parameter in getattr(layer, name).parameters()]
