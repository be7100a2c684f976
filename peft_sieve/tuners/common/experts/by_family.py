"""Which adapter layer serves the experts of a family."""

from __future__ import annotations

import pkgutil

from ....errors import SieveError
from ....moe.families.family import Call
from ....moe.topology import MoELayer
from .fused import FusedSieveExperts
from .layer import SieveExpertLayer
from .module_list import ModuleListSieveExperts
from .parallel import ParallelSieveExperts

_LAYER_CLASSES: dict[Call | None, type[SieveExpertLayer]] = {
    "each_expert": ModuleListSieveExperts,
    "all_tokens": FusedSieveExperts,
    "sorted_rows": ParallelSieveExperts,
}


def layer_class_of(layer: MoELayer) -> type[SieveExpertLayer]:
    """The adapter layer for the experts of a layer: the one that their family names, or else the one for their call.

    Raises:
        SieveError: the family names something else, or neither.
    """
    named, call = layer.family.layer_class, layer.family.call
    layer_class = pkgutil.resolve_name(named) if isinstance(named, str) else named or _LAYER_CLASSES.get(call)
    if isinstance(layer_class, type) and issubclass(layer_class, SieveExpertLayer):
        return layer_class
    raise SieveError(
        f"The experts of {layer.path} belong to the family {layer.family.name!r}, whose layer_class is {named!r}, not "
        "an adapter layer. Derive the family from FusedExperts or ModuleExperts if it shares their forward, or set "
        "layer_class."
    )
