"""Injections that are taken back when something goes wrong in them, or while saved weights are loaded after them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """What the modules of a model hold, so that whatever was put into them since can be taken out again.

    Attributes of modules and the containers among them (sub-modules, parameters, hooks, settings by adapter) are
    remembered, not the values of tensors, which an injection leaves alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        held = (value for _, attributes in self._attributes for value in attributes.values())
        # Content by content, and put back into the same object: handles of hooks look into it.
        self._contents = [(value, value.copy()) for value in held if type(value) in _CONTAINERS]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)


class Injection:
    """An adapter that is put into a model, and can be taken back.

    Attributes:
        tuner: that injects it.
        adapter_name: its name.
    """

    def __init__(self, model: nn.Module, tuner: Any, adapter_name: str) -> None:
        self.tuner, self.adapter_name = tuner, adapter_name
        self._model, self._before = model, Snapshot(model)

    def take_back(self) -> None:
        """Have model and tuner be as before."""
        self._before.restore()
        self.tuner.peft_config.pop(self.adapter_name, None)
        if not self.tuner.peft_config and getattr(self._model, "_hf_peft_config_loaded", False):
            # transformers' add_adapter says "loaded" before anything is.
            self._model._hf_peft_config_loaded = False  # type: ignore[assignment]


class Loading:
    """Saved weights are being loaded.

    Attributes:
        values_follow: adapters that are injected meanwhile get saved values before anybody uses them, so that drawing
            some first would be for nothing.
        injected: those injections.
    """

    def __init__(self, values_follow: bool) -> None:
        self.values_follow = values_follow
        self.injected: list[Injection] = []


_loading: ContextVar[Loading | None] = ContextVar("_loading", default=None)


@contextmanager
def loading(*, values_follow: bool = False) -> Iterator[Loading]:
    """In the block, weights are loaded; if it ends with an exception, adapters that were injected in it are taken back.

    It costs nothing where no adapter of this package is injected.
    """
    outer = _loading.get()
    if outer is not None:  # from_pretrained calls load_adapter
        yield outer
        return
    current = Loading(values_follow)
    token = _loading.set(current)
    try:
        yield current
    except BaseException:
        for injection in reversed(current.injected):
            injection.take_back()
        raise
    finally:
        _loading.reset(token)


def values_follow() -> bool:
    """Whether an adapter that is injected now gets saved values next."""
    current = _loading.get()
    return current is not None and current.values_follow


@contextmanager
def injecting(model: nn.Module, tuner: Any, adapter_name: str) -> Iterator[None]:
    """In the block, an adapter is injected into `model`; after an exception, the model is as before.

    The same holds for exceptions that end a block of `loading` around this one.
    """
    injection, current = Injection(model, tuner, adapter_name), _loading.get()
    try:
        yield
    except BaseException:
        injection.take_back()
        raise
    if current is not None:
        current.injected.append(injection)
