"""Layers that look like a mixture of experts, but have nothing that an adapter could go on, and why."""

from __future__ import annotations

from torch import nn


def why_not(module: nn.Module) -> str | None:
    """What keeps the experts of `module` from being adapted, as the end of a sentence, and what to do instead; None if
    it is of no known kind."""
    return next((reason for looks_like, reason in _KNOWN if looks_like(module)), None)


def _rows_of_embeddings(module: nn.Module) -> bool:
    """doge"""
    return all(isinstance(getattr(module, name, None), nn.Embedding) for name in ("down_embed", "up_embed"))


def _parts_by_data_set(module: nn.Module) -> bool:
    """vitpose_backbone"""
    return isinstance(module, nn.ModuleList) and hasattr(module, "num_experts") and hasattr(module, "part_features")


_KNOWN = (
    (
        _rows_of_embeddings,
        "whose experts are single rows of two embeddings, smaller than any low-rank adapter. Adapt its linear layers "
        "with peft.LoraConfig, and train rows of down_embed and up_embed with its trainable_token_indices.",
    ),
    (
        _parts_by_data_set,
        "whose experts are chosen by the caller (dataset_index), so there is no routing to profile. Adapt its linear "
        "layers with peft.LoraConfig.",
    ),
)
