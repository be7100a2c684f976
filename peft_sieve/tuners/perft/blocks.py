"""The MoE blocks of a model: the modules that route a token to experts and return the sum of what those give."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...errors import SieveError
from ...moe.attention import holds_attention, inside_attention
from ...moe.topology import MoELayer, base_modules, find_moe_layers


@dataclass(frozen=True)
class MoEBlock:
    """A module that adapters can stand beside.

    Attributes:
        path: as `named_modules` of the base model calls it.
        layers: the routed experts inside; nearly always one.
        width: of its input and its output.
    """

    path: str
    layers: tuple[MoELayer, ...]
    width: int


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The MoE blocks of `model`, in the order of its modules.

    Experts of attention (jetmoe's) are left out: no module is called on hidden states and returns such.

    Raises:
        SieveError: the model has none, or its experts lie beside the attention in a module that does more than the MoE
            block (gemma4).
    """
    modules = base_modules(model)
    held: dict[str, list[MoELayer]] = {}
    for layer in find_moe_layers(model):
        held.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    blocks = []
    for path, layers in held.items():
        if holds_attention(modules[path]):
            raise SieveError(
                f"the experts of {layers[0].path} lie in {path} ({type(modules[path]).__name__}) together with its "
                "attention, expected a MoE block to put adapters beside: adapt the experts themselves with "
                "SieveLoraConfig"
            )
        if not inside_attention(path):
            blocks.append(MoEBlock(path, tuple(layers), _width(layers[0], modules)))
    return blocks


def _width(layer: MoELayer, modules: dict[str, nn.Module]) -> int:
    """The width that the router reads: some models make their experts narrower than the block."""
    for router in layer.routers:
        module = modules[router.path]
        if router.parameter is not None:
            return int(module.get_parameter(router.parameter).shape[-1])
        if isinstance(width := getattr(module, "in_features", None), int):
            return width
    return layer.shape.hidden_size
