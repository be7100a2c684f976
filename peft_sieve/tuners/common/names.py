"""Names that an adapter cannot have."""

from __future__ import annotations

from itertools import takewhile

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import SieveError

# What holds adapters by their names, or copies of modules by those of adapters.
_HOLDERS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save", "trainable_tokens_delta"}
_HOLDERS |= {"lora_gate_up_A", "lora_gate_up_B", "lora_gate_up_delta", "lora_down_A", "lora_down_B", "lora_down_delta"}
_HOLDERS |= {"lora_experts", "lora_router", "lora_usage", "lora_dropout"}
_HOLDERS |= {"perft_A", "perft_B", "perft_down", "perft_up", "perft_router", "perft_experts", "perft_dropout"}
# What else is in the keys of adapters.
_OWN = {"base_layer", "base_model", "model", "original_module", "token_adapter", "perft", "weight", "bias"}
_OWN |= {"slots", "blocks", "importance", "ledger", "tokens", "experts", "pruned"}


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuse the name of an adapter that is also a part of keys.

    When PEFT saves one adapter it leaves out every key that has another one's name between dots, and so would leave out
    weights without a word.

    Args:
        model: that the adapter is to go into.

    Raises:
        SieveError: it is such a name.
    """
    paths = (path for named in (model.named_modules(), model.named_parameters()) for path, _ in named)
    in_base = {part for path in paths for part in takewhile(_is_of_base, path.split("."))}
    if adapter_name in in_base | _OWN | _HOLDERS:
        raise SieveError(
            f"the adapter is named {adapter_name!r}, which is a part of the names of weights, expected another name, "
            "since saving would mistake one for the other: choose one such as 'my_adapter'"
        )


def check_not_there(adapter_name: str, model: nn.Module) -> None:
    """Refuse to put an adapter into a model that has one of its name, as a second `get_peft_model` would.

    Raises:
        SieveError: it has one.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if any(adapter_name in layer._get_available_adapters() for layer in layers):
        raise SieveError(
            f"the model has an adapter named {adapter_name!r} already, expected one without it, since the new adapter "
            "would take its place: load the base model again, call unload() first, or choose another adapter_name"
        )


def _is_of_base(part: str) -> bool:
    return part not in _HOLDERS
