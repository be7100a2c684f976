"""Saved weights against the adapter they are loaded into, so that none lands where it was not trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...errors import SieveError
from .layer import CHILD, perft_layers


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
    foreign = [key for key in given if f".{CHILD}.perft_" in key and key not in expected]
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
            slots = given[f"{layer.path}.{CHILD}.perft_experts.slots"].cpu()
            if not torch.equal(slots, layer.slots(adapter_name).cpu()):
                ids = (slots >= 0).nonzero().flatten().tolist()
                raise SieveError(
                    f"the weights belong to experts {ids} of {layer.experts_path}, and adapter '{adapter_name}' has "
                    f"{list(layer.plans[adapter_name].experts)}, expected the same: load them under the configuration "
                    "that they were saved with"
                )
