"""What a model reads: its tokenizer, its vocabulary, the device of its inputs, and the forward without a head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..checks import first_line
from ..errors import SieveError
from ..moe.placement import is_sharded

# What transformers calls the methods by which a model finds positions itself: from images and the mask, or from ids.
_FINDS_POSITIONS = ("get_rope_index", "create_position_ids_from_input_ids")


def find_tokenizer(model: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer to read data with: the one given, the one of that name, or the one saved with the model.

    Returns None where none is needed or found; reading text then fails with a sentence that asks for one.
    """
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    name = tokenizer or getattr(model, "name_or_path", None)
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises whatever a file leads to, or a library that is missing
        if tokenizer is not None:
            raise SieveError(f"the tokenizer {tokenizer!r} cannot be loaded: {first_line(error)}.") from error
        return None


def backbone_forward(model: nn.Module) -> Callable[[dict[str, Any]], None]:
    """A forward without the head; of a sharded model the whole one, which FSDP2 wants to be entered at its root."""
    backbone = model if is_sharded(model) else getattr(model, "base_model", model)
    parameters = inspect.signature(backbone.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    counts_padding = "position_ids" in parameters and not _finds_positions(backbone)

    def forward(batch: dict[str, Any]) -> None:
        mask = batch.get("attention_mask")
        positions_wanted = counts_padding and "position_ids" not in batch
        if positions_wanted and isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all()):
            # Left padding: a token's position is its place among the real ones, as `generate` has it.
            batch["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if takes_any or "use_cache" in parameters:
            batch["use_cache"] = False
        if "logits_to_keep" in parameters:
            batch["logits_to_keep"] = 1
        backbone(**batch)

    return forward


def _finds_positions(model: nn.Module) -> bool:
    """Whether a model finds the positions of its tokens itself, which it does only where none are given."""
    return any(hasattr(module, name) for module in model.modules() for name in _FINDS_POSITIONS)


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its inputs; offloaded weights are on no device until they are used."""
    embeddings: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model  # type: ignore[operator]
    hook = getattr(embeddings, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    if execution_device is not None:
        return torch.device(execution_device)
    return next(embeddings.parameters()).device


def check_vocabulary(model: nn.Module, batch: dict[str, Any]) -> None:
    """Refuse token ids that the model has no embedding for, as those of another model's tokenizer may be.

    Raises:
        SieveError: there are such ids.
    """
    embeddings: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    ids = batch.get("input_ids")
    if type(embeddings) is not nn.Embedding or not isinstance(ids, torch.Tensor) or not ids.numel():
        return
    if int(ids.max()) >= embeddings.num_embeddings:
        raise SieveError(
            f"The calibration data has the token id {int(ids.max())}, but the model has {embeddings.num_embeddings} "
            "embeddings. Pass the model's own tokenizer (calib_tokenizer)."
        )


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors there, also those of masks for kinds of layers."""
    return {k: _to(v, device) for k, v in batch.items()}


def _to(value: Any, device: torch.device) -> Any:
    if type(value) is dict:
        return on_device(value, device)
    return value.to(device) if isinstance(value, torch.Tensor) else value
