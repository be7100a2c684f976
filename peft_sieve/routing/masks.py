"""Which tokens of a batch are real, in every form of `attention_mask` that models of transformers take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SieveError

# A score this far below others gets no attention: masks are made with -inf, the least value of a type, or -1e4.
_NO_ATTENTION = -1e3
_FORMS = (
    "Pass one of shape (batch, length) with 0 for padding, or of shape (batch, heads, length, length) that is boolean "
    "or additive, with 0 where a token attends and a large negative number elsewhere."
)


def real_tokens(mask: Any) -> Tensor | None:
    """Which tokens are not padding.

    A token is real if it attends to itself, and to another token or is attended to by one: where nothing may be empty,
    padding attends to itself alone, or to everything.

    Args:
        mask: (batch, length), 0 for padding; (batch, heads, length, length), boolean or additive; or a mapping from
            kinds of layers to such masks.

    Returns:
        Boolean, (batch, length); None where the mask does not say.
    """
    if isinstance(mask, Mapping):
        found = map(real_tokens, mask.values())
        return next((real for real in found if real is not None), None)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    attends = attended(mask)
    return None if attends is None else _real(attends)


def token_mask(mask: Any, batch: Mapping[str, Any] | None = None) -> Tensor | None:
    """As `real_tokens`, one token after the other, (batch * length,).

    Args:
        mask: as there.
        batch: the other inputs of the model, if the mask may be the same for all rows.
    """
    real = real_tokens(mask)
    if real is None:
        return None
    inputs = [(batch or {}).get(name) for name in ("input_ids", "inputs_embeds")]
    rows = next((len(value) for value in inputs if isinstance(value, Tensor)), len(real))
    return (real.expand(rows, -1) if len(real) == 1 else real).reshape(-1)


def attended(mask: Any) -> Tensor | None:
    """Which tokens attend to which in some head, by a mask for each query: (batch, query, key); None for others."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    if mask.dtype == torch.bool:
        return mask.any(1)
    return (mask > _NO_ATTENTION).any(1) if mask.is_floating_point() else None


def _real(attends: Tensor) -> Tensor:
    itself = attends.diagonal(dim1=-2, dim2=-1)
    if attends.shape[-1] == 1:
        return itself
    others = attends & ~torch.eye(attends.shape[-1], dtype=torch.bool, device=attends.device)
    # Of padding on the left: it attends to everything, also to later tokens that do not attend to it.
    one_sided = (attends & ~attends.transpose(-1, -2)).triu(1).any(-1)
    return itself & (others.any(-1) | others.any(-2)) & ~(attends.all(-1) & one_sided)


def check_readable(mask: Any, shape: tuple[int, ...], name: str, tokens: str = "input_ids") -> None:
    """Refuse a mask of which nobody can tell which tokens are real.

    Args:
        mask: None, or as for `real_tokens`.
        shape: (batch, length) of what it is for.
        name, tokens: what both are called, for the error.

    Raises:
        SieveError: it has another form or shape, or its values do not belong to its form.
    """
    if isinstance(mask, Mapping):
        for kind, of_layers in mask.items():
            check_readable(of_layers, shape, f"{name}[{kind!r}]", tokens)
        known = [real for real in map(real_tokens, mask.values()) if real is not None]
        if any(not torch.equal(real.expand(shape), known[0].expand(shape)) for real in known):
            raise SieveError(f"The masks of {name} do not agree on which tokens are padding. Make them agree.")
        return
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        form = f"the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
        raise SieveError(f"{name} has {form}, in which padding cannot be told from tokens. {_FORMS}")
    expected = shape if mask.dim() == 2 else (*shape, shape[1])
    given = tuple(mask.shape) if mask.dim() == 2 else (mask.shape[0], *mask.shape[2:])
    if given != expected and (mask.dim() == 2 or given != (1, *expected[1:])):
        raise SieveError(f"{name} has the shape {tuple(mask.shape)} and `{tokens}` the shape {shape}. {_FORMS}")
    wrong = bool((mask < 0).any()) if mask.dim() == 2 else not _is_mask_of_queries(mask)
    if wrong:
        kind = "negative values" if mask.dim() == 2 else f"values of type {mask.dtype} that are neither of both"
        raise SieveError(f"{name} of shape {tuple(mask.shape)} has {kind}. {_FORMS}")


def _is_mask_of_queries(mask: Tensor) -> bool:
    """Boolean, or additive, which has no value above 0: else it is one of zeros and ones, and would mask nothing."""
    return mask.dtype == torch.bool or (mask.is_floating_point() and not bool((mask > 0).any()))
