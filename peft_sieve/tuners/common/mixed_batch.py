"""Mixed batches: each row of a batch with an adapter of its own (`adapter_names=[...]`), for inference.

Every adapter layer gets the names and selects rows by them, as in PEFT. Inside a MoE block there are no rows any more:
tokens come flattened, those of one row after those of another. The layers there that are more than a linear map (the
router, the experts) run once for each adapter in the batch, on the tokens of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import SieveError
from ...moe.topology import MoELayer, find_moe_layers
from .experts.layer import SieveExpertLayer

BASE = "__base__"


@contextmanager
def mixed_batch(
    model: nn.Module, encoder: nn.Module | None, adapter_names: Any, known: Sequence[str], num_beams: int = 1
) -> Iterator[None]:
    """In the block, row i of a batch that `model` gets goes through adapter i of `adapter_names`.

    Args:
        encoder: the part of `model` that gets each row once, even when it is searched with several beams.
        adapter_names: a name for each row; "__base__" is the model without an adapter.
        known: the adapters that there are.
        num_beams: how often each row is repeated in what the model gets.

    Raises:
        SieveError: the model or the names do not allow it; nothing was changed. In the block: the batch has another
            number of rows.
    """
    _check_names(model, adapter_names, known)
    in_encoder = set() if encoder is None else set(encoder.modules())
    in_blocks = {m for layer in find_moe_layers(model) for m in _block(model, layer).modules()}
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    handles = [model.register_forward_pre_hook(partial(_check_rows, repeated), with_kwargs=True)]
    for module in model.modules():
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            names = list(adapter_names) if module in in_encoder else repeated
            # Elsewhere a first dimension of another length is no flattened batch, and PEFT refuses it.
            hook = _pass_names_by_token if module in in_blocks else _pass_names
            handles.append(module.register_forward_pre_hook(partial(hook, names), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_names(model: nn.Module, adapter_names: Any, known: Sequence[str]) -> None:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise SieveError(
            f"adapter_names is {adapter_names!r}, expected a list with the name of an adapter for each row of the "
            "batch: pass one"
        )
    unknown = sorted(set(adapter_names) - {BASE, *known})
    if unknown:
        raise SieveError(
            f"adapter_names holds {', '.join(unknown)}, expected names among {', '.join([BASE, *known])}: load the "
            "adapter first, or correct the name"
        )
    if model.training:
        raise SieveError(
            "adapter_names was passed to a model in training mode, expected evaluation mode, since mixed batches are "
            "for inference: call eval() first, or train one adapter after the other"
        )
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise SieveError(
                f"adapter_names was passed while {', '.join(module.merged_adapters)} is merged, expected adapters "
                "apart from the weights: call unmerge_adapter first"
            )
        if isinstance(module, SieveExpertLayer) and not module.supports_mixed_batches:
            raise SieveError(
                f"adapter_names was passed and the experts of {module.path} are separate modules that do not tell "
                "which rows their tokens come from, expected fused experts: group the samples by adapter, and call "
                "set_adapter before each group"
            )


_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _check_rows(adapter_names: list[str], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = (*args[:1], *(kwargs.get(name) for name in _INPUTS))
    num_rows = next((len(value) for value in given if isinstance(value, torch.Tensor)), len(adapter_names))
    if num_rows != len(adapter_names):
        raise SieveError(
            f"adapter_names stands for {len(adapter_names)} rows and the batch has {num_rows}, expected a name for "
            "each row (times num_beams, if that is passed to generate): pass as many names as rows"
        )


def _block(model: nn.Module, layer: MoELayer) -> nn.Module:
    """What a router and its experts are in."""
    return model.get_submodule(layer.path.rpartition(".")[0])


def _pass_names(
    adapter_names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _pass_names_by_token(
    adapter_names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return args, {**kwargs, "adapter_names": names_by_token(adapter_names, len(inputs))}


def names_by_token(adapter_names: list[str], num_tokens: int) -> list[str]:
    """The adapter of each token, of rows that were flattened one after the other.

    Raises:
        SieveError: the tokens are no whole number of rows of one length.
    """
    num_rows = len(adapter_names)
    if num_rows == 0 or num_tokens % num_rows:
        raise SieveError(
            f"a layer got {num_tokens} tokens of the {num_rows} rows that adapter_names stands for, expected as many "
            "of each row: pad the rows to one length instead of packing them"
        )
    length = num_tokens // num_rows
    return adapter_names if length == 1 else [name for name in adapter_names for _ in range(length)]
