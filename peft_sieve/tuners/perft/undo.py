"""The way back when adapters were put beside the blocks of a model, and then their weights turned out wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import _delete_auxiliary_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..common.undo import ATTRIBUTES, restore, unwrap
from .balance import stop_adding
from .layer import CHILD, PerftLayer, detach, perft_layers


@contextmanager
def as_before_on_error(model: nn.Module) -> Iterator[None]:
    """When the block ends with an exception, take out the PERFT adapters that came into `model` during it.

    Its modules, its other adapters, and what is trainable are as before then.
    """
    before = {id(layer): set(layer.plans) for layer in perft_layers(model)}
    wrappers = {id(wrapper) for _, wrapper in _auxiliary(model)}
    trainable = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    attributes = {name: vars(model)[name] for name in ATTRIBUTES if name in vars(model)}
    try:
        yield
    except Exception:
        new = {name for layer in perft_layers(model) for name in set(layer.plans) - before.get(id(layer), set())}
        if new:
            _take_out(model, new, before)
            _take_out_auxiliary(model, new, wrappers)
            restore(model, trainable, attributes, new)
        raise


def _take_out(model: nn.Module, names: set[str], before: dict[int, set[str]]) -> None:
    for block in list(model.modules()):
        layer = getattr(block, CHILD, None)
        if not isinstance(layer, PerftLayer):
            continue
        if id(layer) not in before:
            detach(block)
            continue
        for name in names & set(layer.plans):
            layer.delete_adapter(name)
    if not perft_layers(model):
        for module in model.modules():
            stop_adding(module)


def _auxiliary(model: nn.Module) -> list[tuple[str, AuxiliaryTrainingWrapper]]:
    """(path, wrapper) of modules that are trained whole beside adapters."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _take_out_auxiliary(model: nn.Module, names: set[str], before: set[int]) -> None:
    for path, wrapper in _auxiliary(model):
        if id(wrapper) not in before:
            unwrap(model, path)
    for name in names:
        _delete_auxiliary_adapter(model, adapter_name=name, new_active_adapters=None)
