"""A layer run once for each adapter of a mixed batch, on the tokens of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...errors import SieveError
from ...hf import captured_outputs


def each_adapter(
    run: Callable[..., Any], adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `run(name, *args, **kwargs)` once for each name, with its tokens only, and put the results together.

    What transformers records meanwhile (router logits) is put together as well.

    Args:
        run: returns tensors, alone or in a structure, with one entry a token.
        adapter_names: of each token, (tokens,).
        args, kwargs: tensors that have one entry a token are split, everything else is passed as it is.

    Raises:
        SieveError: a result has no entry for each token.
    """
    unique = list(dict.fromkeys(adapter_names))
    if len(unique) == 1:
        return run(unique[0], *args, **kwargs)
    num_tokens = len(adapter_names)
    numbers = torch.tensor([unique.index(name) for name in adapter_names])
    merged: list[Any] = []
    structure = None
    for number, name in enumerate(unique):
        tokens = (numbers == number).nonzero().squeeze(-1)  # (tokens of this adapter,)
        some_args, some_kwargs = tree_map(partial(_select, tokens, num_tokens), (args, kwargs))
        with captured_outputs.apart() as part:
            results, structure = tree_flatten((run(name, *some_args, **some_kwargs), part))
        merged = merged or [None] * len(results)
        merged = [_insert(whole, part, tokens, num_tokens) for whole, part in zip(merged, results, strict=True)]
    assert structure is not None
    result, outputs = tree_unflatten(merged, structure)
    captured_outputs.add(outputs)
    return result


def _select(tokens: torch.Tensor, num_tokens: int, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != num_tokens:
        return value
    return value.index_select(0, tokens.to(value.device))


def _insert(whole: Any, part: Any, tokens: torch.Tensor, num_tokens: int) -> Any:
    if part is None:
        return None
    length = len(part) // len(tokens) if isinstance(part, torch.Tensor) and part.dim() else 0
    if length == 0 or len(part) != length * len(tokens):
        raise SieveError(
            f"adapter_names was passed and a layer gave a result {tuple(getattr(part, 'shape', ()))} that has no entry "
            f"for each of its {len(tokens)} tokens, expected one: group the samples by adapter, and call set_adapter "
            "before each group"
        )
    if whole is None:
        whole = part.new_empty((num_tokens * length, *part.shape[1:]))
    # A layer that gets rows may give their tokens: (rows * length, ...).
    by_token = whole.unflatten(0, (num_tokens, length))
    return by_token.index_copy(0, tokens.to(part.device), part.unflatten(0, (len(tokens), length))).flatten(0, 1)
