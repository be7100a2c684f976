"""Saved weights decide the shapes: a checkpoint from before or after pruning fits an adapter that is at another point.

Trainer loads a checkpoint into an adapter that is there already, and PEFT then ignores the checkpoint's configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ...errors import SieveError
from ..common.loading import layers_for, refuse_foreign, saved_in, tensors_in
from .config import LoraMoeConfig
from .layer import LoraMoeLayer

_USAGE = ("lora_usage.experts", "lora_usage.pruned", "lora_usage.tokens")
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_router.weight")


def fit_to_weights(
    model: nn.Module, config: LoraMoeConfig, adapter_name: str, given: Mapping[str, torch.Tensor]
) -> None:
    """Give an adapter the experts that the weights, which are to be loaded, belong to.

    Args:
        config: of the adapter; its `kept_experts` becomes that of the weights.
        given: checkpoint keys of the base model, without adapter names.

    Raises:
        SieveError: the weights belong to other layers, ranks or numbers of experts; nothing was changed.
    """
    layers = layers_for(model, adapter_name, given)
    own = {path: [f"{path}.{name}" for name, _ in tensors_in(layer, adapter_name)] for path, layer in layers.items()}
    found = {
        path: _checked(path, layer, adapter_name, saved_in(given, path, own[path])) for path, layer in layers.items()
    }
    refuse_foreign(given, (key for keys in own.values() for key in keys), adapter_name, "lora_")
    forgotten = False
    for path, (experts, pruned) in found.items():
        plan = layers[path].plans[adapter_name]
        if (list(plan.experts), plan.pruned) != (experts, pruned):
            forgotten |= layers[path].reshape(adapter_name, experts, pruned)
    if forgotten:
        warnings.warn(
            f"The loaded weights are of other experts than adapter '{adapter_name}' had, so its optimizer begins anew "
            "with these. Load a state of the optimizer that belongs to them if there is one.",
            UserWarning,
            stacklevel=2,
        )
    pruned_now = any(pruned for _, pruned in found.values())
    config.kept_experts = {path: experts for path, (experts, _) in found.items()} if pruned_now else None


def _checked(
    path: str, layer: LoraMoeLayer, adapter_name: str, saved: Mapping[str, torch.Tensor]
) -> tuple[list[int], bool]:
    """Ids of the experts of one layer's weights, and whether they were pruned."""
    plan, advice = layer.plans[adapter_name], "Load them under the configuration that they were saved with."
    for name in (*_USAGE, *_FACTORS):
        if name not in saved:
            raise SieveError(f"The checkpoint has no {path}.{name} for adapter '{adapter_name}'. {advice}")
    experts, pruned, tokens = (saved[name].tolist() for name in _USAGE)
    sizes = [tuple(saved[name].shape) for name in _FACTORS]
    width = len(experts) * plan.r
    expected = [(width, layer.in_features), (layer.out_features, width), (len(experts), layer.in_features)]
    # Other numbers would be an average, and (3 + 5) / 2 is an expert, too.
    whole = not saved["lora_usage.experts"].is_floating_point()
    inside = whole and sorted(set(experts)) == experts and all(0 <= expert < plan.num_experts for expert in experts)
    if len(tokens) != plan.num_experts or sizes != expected or not inside or pruned not in ([0], [1]):
        raise SieveError(
            f"The weights of {path} are experts {experts} of {len(tokens)} with lora_A of shape {sizes[0]}, and "
            f"adapter '{adapter_name}' has some of {plan.num_experts} experts of rank {plan.r}. {advice}"
        )
    return experts, pruned == [1]
