"""Names that an adapter cannot have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import SieveError
from ...hf.methods import layer_words, methods

# What else PEFT has in the keys of adapters.
_PEFT_WORDS = {"base_layer", "base_model", "model", "original_module", "modules_to_save", "weight", "bias"}
_PEFT_WORDS |= {"token_adapter", "trainable_tokens_delta"}


def check_adapter_names(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Refuse the names of adapters that are also parts of keys.

    When PEFT saves one adapter it leaves out every key that has another one's name between dots, and so would leave out
    weights without a word.

    Args:
        model: that the adapters are in.

    Raises:
        SieveError: one has such a name.
    """
    words = _PEFT_WORDS | layer_words([LoraModel, *(method.model for method in methods())])
    words |= {part for method in methods() for part in method.key_parts}
    words |= _words_of_base(model)
    for name in adapter_names:
        if name in words:
            raise SieveError(
                f"An adapter cannot be named {name!r}, which is a part of the names of weights: saving would mistake "
                "one for the other. Choose another name, such as 'my_adapter'."
            )


def _words_of_base(model: nn.Module) -> set[str]:
    """The parts of the names of modules and parameters, without what adapter layers hold adapters in."""
    words: set[str] = set()

    def visit(module: Any) -> None:
        words.update(name for name, _ in module.named_parameters(recurse=False))
        held: tuple[str, ...] = ()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            held = (*module.adapter_layer_names, *module.other_param_names)
        for name, child in module.named_children():
            if name not in held:
                words.add(name)
                visit(child)

    visit(model)
    return words


def check_not_there(adapter_name: str, model: nn.Module) -> None:
    """Refuse to put an adapter into a model that has one of its name, as a second `get_peft_model` would.

    Raises:
        SieveError: it has one.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if any(adapter_name in layer._get_available_adapters() for layer in layers):
        raise SieveError(
            f"The model already has an adapter named {adapter_name!r}, whose place the new one would take. Load the "
            "base model again, call unload() first, or choose another adapter_name."
        )
