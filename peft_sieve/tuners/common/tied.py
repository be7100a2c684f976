"""Weights that modules in several places share, which merging an adapter into one of them must not change for all."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from ...errors import SieveError
from .exact_unmerge import ExactUnmerge
from .experts.layer import expert_layers


def refuse_shared_modules(model: nn.Module) -> None:
    """Refuse merging where what is added in one place would change another.

    Raises:
        SieveError: the weights of adapted experts also belong to another module, or a module that has an adapter in one
            place is in another, too, where it has none.
    """
    places = _Places(model)
    for path, layer in expert_layers(model):
        for parameter in layer.get_base_layer().parameters():
            for name, _ in places.elsewhere(layer, parameter):
                raise SieveError(
                    f"The experts of {path} share their weights with other modules ({name.replace('.base_layer', '')}),"
                    " which merging would change, too. Keep the adapter unmerged."
                )
    for path, layer in _exact_layers(model):
        for name, module in places.elsewhere(layer, layer.base_parameter()):
            if module is layer.get_base_layer():
                other = name.rpartition(".")[0].replace(".base_layer", "")
                raise SieveError(
                    f"{path} is the same module as {other}, which merging would change, too. Keep the adapter unmerged."
                )


def mark_shared_weights(model: nn.Module) -> None:
    """Tell the unmerged layers of PEFT's kind whether another module has their weight, too, as tied embeddings do."""
    places = _Places(model)
    for _, layer in _exact_layers(model):
        if not layer.merged:
            layer.weight_is_shared = bool(places.elsewhere(layer, layer.base_parameter()))


def _exact_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, ExactUnmerge)]


class _Places:
    """Which modules have which weights, by all names that those have."""

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[nn.Module, list[str]] = {}
        self._users: dict[Hashable, list[tuple[str, nn.Module]]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(path)
            own = [(f"{path}.{name}", parameter) for name, parameter in module._parameters.items()]
            if isinstance(module, ExactUnmerge):
                own += [(f"{path}.base_layer.{module.parameter_name}", weight) for weight in module.put_aside]
            for name, parameter in own:
                if parameter is not None:
                    self._users.setdefault(_memory(parameter), []).append((name, module))

    def elsewhere(self, layer: nn.Module, parameter: nn.Parameter) -> list[tuple[str, nn.Module]]:
        """(name, module) of each use of a layer's weight outside of the layer, wherever that is itself."""
        inside = tuple(f"{path}." for path in self._paths[layer])
        users = self._users.get(_memory(parameter), [])
        return [(name, module) for name, module in users if not name.startswith(inside)]


def _memory(parameter: nn.Parameter) -> Hashable:
    """The same for weights that are one in memory, also where they are several objects."""
    plain = type(parameter.data).__module__ == "torch" and not parameter.is_meta and parameter.numel()
    return (parameter.device, parameter.data_ptr()) if plain else id(parameter)
