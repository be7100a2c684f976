"""Weights that experts in several places share cannot have an adapter merged into them."""

from __future__ import annotations

from torch import nn

from ...errors import SieveError
from .experts.layer import expert_layers


def refuse_tied_experts(model: nn.Module) -> None:
    """Refuse merging where the weights of adapted experts also belong to another module.

    Raises:
        SieveError: they do; what is added in one place would change the other.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for path, layer in expert_layers(model):
        for parameter in layer.get_base_layer().parameters():
            names = (name.replace(".base_layer", "") for name in users[id(parameter)])
            elsewhere = [name for name in names if not name.startswith(f"{path}.")]
            if elsewhere:
                raise SieveError(
                    f"The experts of {path} share their weights with other modules ({elsewhere[0]}), which "
                    "merging would change, too. Keep the adapter unmerged."
                )
