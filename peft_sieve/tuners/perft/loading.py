"""Saved weights against the adapter they are loaded into, so that none lands where it was not trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...errors import SieveError
from .layer import CHILD, PerftLayer, perft_layers


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of another variant, form, size, selection or set of blocks than the adapter's.

    Args:
        model: has the adapter injected already.
        state_dict: checkpoint keys, without adapter names.

    Raises:
        SieveError: and nothing was loaded.
    """
    given = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    layers = perft_layers(model)
    expected = {key: shape for layer in layers for key, shape in layer.tensors(adapter_name).items()}
    foreign = [key for key in given if (".perft_" in key or ".lora_" in key) and key not in expected]
    for key in (*expected, *foreign):
        found = tuple(given[key].shape) if key in given else None
        if found != expected.get(key):
            raise SieveError(
                f"the weights hold {key} with shape {found}, and adapter '{adapter_name}' has it with shape "
                f"{expected.get(key)}, expected the same: load them under the configuration and the base model that "
                "they were saved with"
            )
    for layer in layers:
        if adapter_name in layer.perft_experts:
            _check_slots(layer, adapter_name, given[f"{layer.path}.{CHILD}.perft_experts.slots"])


def check_loaded(model: nn.Module, adapter_name: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse what transformers' `load_adapter`, which assigns tensors without asking, has loaded.

    Raises:
        SieveError: tensors are missing or left over, or belong to other experts than the configuration says.
    """
    keys = [key for key in (*missing, *unexpected) if ".perft_" in key or ".lora_" in key]
    if keys:
        raise SieveError(
            f"the weights and adapter '{adapter_name}' do not have {keys[0]} in common ({len(keys)} such in all), "
            "expected the same tensors: load them under the configuration they were saved with"
        )
    for layer in perft_layers(model):
        if adapter_name in layer.perft_experts:
            _check_slots(layer, adapter_name, layer.slots(adapter_name))


def _check_slots(layer: PerftLayer, adapter_name: str, slots: torch.Tensor) -> None:
    expected = layer.plans[adapter_name].experts
    ids = tuple((slots >= 0).nonzero().flatten().tolist())
    if ids != expected or slots[list(ids)].tolist() != list(range(len(ids))):
        raise SieveError(
            f"the weights belong to experts {list(ids)} of {layer.experts_path}, and adapter '{adapter_name}' has "
            f"{list(expected)}, expected the same: load them under the configuration that they were saved with"
        )
