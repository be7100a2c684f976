"""Saved weights decide the shapes: a checkpoint from before or after pruning fits an adapter that is at another point.

Trainer loads a checkpoint into an adapter that is there already, and PEFT then ignores the checkpoint's configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...errors import SieveError
from .config import LoraMoeConfig
from .layer import LoraMoeLayer
from .pruning import lora_moe_layers

_USAGE = ".lora_usage."
_BOOKKEEPING = ("lora_usage.experts", "lora_usage.pruned", "lora_usage.tokens")
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_router.weight")
_PREFIX = "base_model.model."


def fit_to_weights(
    model: nn.Module, config: LoraMoeConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Give an adapter the experts that the weights, which are to be loaded, belong to.

    Args:
        config: of the adapter; its `kept_experts` becomes that of the weights.
        state_dict: checkpoint keys, without adapter names.

    Raises:
        SieveError: the weights belong to other layers, ranks or numbers of experts; nothing was changed.
    """
    given = {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    layers = {
        path.removeprefix(_PREFIX): layer for path, layer in lora_moe_layers(model) if adapter_name in layer.plans
    }
    foreign = sorted({key.partition(_USAGE)[0] for key in given if _USAGE in key} - set(layers))
    if foreign:
        raise SieveError(
            f"the weights hold LoRA experts of {foreign[0]} ({len(foreign)} such layers), which adapter "
            f"'{adapter_name}' does not target, expected the same layers: load them with the configuration they were "
            "saved with"
        )
    found = {path: _checked(path, layer, adapter_name, given) for path, layer in layers.items()}
    own = {f"{path}.{name}" for path in layers for name in (*_BOOKKEEPING, *_FACTORS)}
    left_over = sorted(key for key in given if ".lora_" in key and key not in own)
    if left_over:
        raise SieveError(
            f"the weights hold {left_over[0]}, which adapter '{adapter_name}' has not ({len(left_over)} in all), "
            "expected its own only: load them with the configuration they were saved with"
        )
    forgotten = False
    for path, (experts, pruned) in found.items():
        plan = layers[path].plans[adapter_name]
        if (list(plan.experts), plan.pruned) != (experts, pruned):
            forgotten |= layers[path].reshape(adapter_name, experts, pruned)
    if forgotten:
        warnings.warn(
            f"the loaded weights are of other experts than adapter '{adapter_name}' had, so its optimizer begins "
            "anew with these: load a state of the optimizer that belongs to them if there is one",
            UserWarning,
            stacklevel=2,
        )
    pruned_now = any(pruned for _, pruned in found.values())
    config.kept_experts = {path: experts for path, (experts, _) in found.items()} if pruned_now else None


def check_loaded(model: nn.Module, adapter_name: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse what transformers' `load_adapter`, which assigns tensors without asking, has loaded.

    Raises:
        SieveError: tensors are missing or left over, or belong to other experts than the configuration says.
    """
    keys = [key for key in (*missing, *unexpected) if ".lora_" in key]
    if keys:
        raise SieveError(
            f"the weights and adapter '{adapter_name}' do not have {keys[0]} in common ({len(keys)} such in all), "
            "expected the same tensors: load them under the configuration they were saved with"
        )
    for path, layer in lora_moe_layers(model):
        if adapter_name not in layer.plans:
            continue
        plan, usage = layer.plans[adapter_name], layer.usage(adapter_name)
        experts, pruned = tuple(usage.experts.tolist()), bool(usage.pruned)
        if (experts, pruned) != (plan.experts, plan.pruned):
            raise SieveError(
                f"the weights of {path} belong to {'pruned' if pruned else 'unpruned'} experts {list(experts)}, and "
                f"adapter '{adapter_name}' has {'pruned' if plan.pruned else 'unpruned'} experts {list(plan.experts)}, "
                "expected the same: load them under the configuration that they were saved with"
            )


def _checked(
    path: str, layer: LoraMoeLayer, adapter_name: str, given: Mapping[str, torch.Tensor]
) -> tuple[list[int], bool]:
    """Ids of the experts of one layer's weights, and whether they were pruned."""
    plan = layer.plans[adapter_name]
    for name in (*_BOOKKEEPING, *_FACTORS):
        if f"{path}.{name}" not in given:
            raise SieveError(
                f"the weights hold no {path}.{name}, expected it for adapter '{adapter_name}': load them with the "
                "configuration they were saved with"
            )
    experts, pruned, tokens = (given[f"{path}.{name}"].tolist() for name in _BOOKKEEPING)
    sizes = [tuple(given[f"{path}.{name}"].shape) for name in _FACTORS]
    width = len(experts) * plan.r
    expected = [(width, layer.in_features), (layer.out_features, width), (len(experts), layer.in_features)]
    inside = sorted(set(experts)) == experts and all(0 <= expert < plan.num_experts for expert in experts)
    if len(tokens) != plan.num_experts or sizes != expected or not inside or pruned not in ([0], [1]):
        raise SieveError(
            f"the weights of {path} are experts {experts} of {len(tokens)} with lora_A of shape {sizes[0]}, "
            f"expected some of {plan.num_experts} experts of rank {plan.r}: load them with the configuration they were "
            "saved with"
        )
    return experts, pruned == [1]
