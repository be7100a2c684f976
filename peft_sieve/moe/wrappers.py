"""Modules around modules: names as they are without them.

`torch.compile` and activation checkpointing put a module around another and so a word into the names of all that is in
it. What is saved under such a name belongs to no model without the wrapper.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import SieveError

_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
# A word of these and the dot behind it, which patterns may escape.
_WORDS = re.compile(rf"(?<![\w])(?:{_COMPILED}|{_CHECKPOINTED})(?:\\?\.|$)")


def plain_name(name: str) -> str:
    """A module's name, or a pattern of names, without what wrappers put into it."""
    return _WORDS.sub("", name).removesuffix(".") if _WORDS.search(name) else name


def innermost(module: nn.Module) -> nn.Module:
    """What is inside of wrappers; a module that is not one is itself."""
    while (name := next((word for word in (_COMPILED, _CHECKPOINTED) if word in module._modules), None)) is not None:
        inner = module._modules[name]
        assert inner is not None
        module = inner
    return module


def compiled_in_place(model: nn.Module) -> nn.Module:
    """The model without the wrappers that `torch.compile` put around it or its modules, which are compiled as
    `Module.compile` does it instead, with the options that they were given."""
    model = _unwrapped(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            parent._modules[name] = _unwrapped(child)
    return model


def _unwrapped(module: nn.Module) -> nn.Module:
    while (inner := module._modules.get(_COMPILED)) is not None:
        wrapper: Any = module
        inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)
        module = inner
    return module


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a module in it runs compiled."""
    return any(_COMPILED in m._modules or m._compiled_call_impl is not None for m in model.modules())


def uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """In the block nothing of a model runs compiled: compiled code passes by hooks that are newer than itself."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse to put adapters into what wraps modules in a way that new parameters do not fit into.

    Raises:
        SieveError: the model is tensor-parallel or for several devices, or has modules with activation checkpointing
            around them.
    """
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise SieveError(
            f"Tensor parallelism (tp_size={model.tp_size}) is not supported for adapters of this package. Load the "
            "model with DistributedConfig(fsdp_size=...), or train it with accelerate's FSDP2."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise SieveError(
            f"The model is a {type(model).__name__}, which would not train parameters that are added to it. Pass "
            "model.module, and wrap the result."
        )
    for path, module in model.named_modules():
        if _CHECKPOINTED in module._modules:
            raise SieveError(
                f"The module {path!r} is a {type(module).__name__}, under which PEFT does not find modules by their "
                "names. Add the adapter first, or use model.gradient_checkpointing_enable()."
            )
