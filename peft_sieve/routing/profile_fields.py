"""The fields of a routing profile, checked and converted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import listed, must_be, one_line
from ..errors import SieveError

COUNTS_DTYPE, MASS_DTYPE = torch.int64, torch.float64
WEIGHTS = ("mass", "sample_share", "sample_mass")  # what a profile may hold beside its counts


def as_rows(array: Any, what: str) -> list[Any]:
    """The layers of a `(layers, experts)` tensor, array or nested list; rows of a list may differ in length."""
    try:
        rows = [] if isinstance(array, str | bytes | Mapping) else list(array)
    except TypeError:  # neither a list nor an array with dimensions
        rows = []
    if not rows:
        raise must_be(what, "an array of shape (layers, experts)", array)
    return rows


def checked_names(layer_names: Sequence[str] | None, num_layers: int) -> list[str]:
    """One distinct name per layer; `layers.0`, `layers.1`, ... by default."""
    if layer_names is None:
        return [f"layers.{index}" for index in range(num_layers)]
    names = [layer_names] if isinstance(layer_names, str) else list(layer_names)
    if len(names) != num_layers:
        raise SieveError(f"layer_names has length {len(names)} for {num_layers} layers. Pass one name per layer.")
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise SieveError(f"layer_names has {repeated[0]!r} more than once. Pass distinct names.")
    return names


def per_layer(values: Any, what: str, convert: Callable[[Any, str], Tensor]) -> dict[str, Tensor]:
    """A mapping from layer name to what `convert(values, name)` makes of its values; `what` they are, for errors."""
    if not isinstance(values, Mapping) or not values:
        advice = "Use RoutingProfile.from_arrays for arrays of shape (layers, experts)."
        raise must_be(what, "a mapping from layer name to tensor with at least one layer", values, advice)
    for name in values:
        if not isinstance(name, str) or not name:
            raise must_be("The name of a layer", "a non-empty string", name)
    return {name: convert(layer, name) for name, layer in values.items()}


def as_vector(values: Any, what: str, layer: str) -> Tensor:
    """`values` as a tensor `(num_experts,)` on the CPU that shares no memory with them."""
    try:
        if isinstance(values, Tensor):
            vector = values.detach().cpu().clone()
        else:
            vector = torch.tensor(values)
            if vector.is_floating_point():  # Python floats would have been rounded to float32
                vector = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise SieveError(f"The {what} of layer {layer!r} must be numbers. {one_line(error)}.") from error
    if vector.dim() != 1 or vector.numel() == 0:
        raise must_be(f"The {what} of layer {layer!r}", "of shape (num_experts,)", tuple(vector.shape))
    if vector.dtype == torch.bool or vector.is_complex():
        raise must_be(f"The {what} of layer {layer!r}", "numbers", vector.dtype)
    return vector


def as_counts(values: Any, layer: str) -> Tensor:
    """Whole numbers of at least 0, `(num_experts,)`, int64."""
    vector = as_vector(values, "counts", layer)
    counts = vector.to(COUNTS_DTYPE)
    bad = counts < 0
    if vector.is_floating_point():
        bad |= counts.to(torch.float64) != vector.to(torch.float64)
    _refuse_values(vector, bad, f"The counts of layer {layer!r}", "whole numbers of at least 0")
    return counts


def as_mass(values: Any, layer: str, what: str = "mass") -> Tensor:
    """Finite numbers of at least 0, `(num_experts,)`, float64."""
    mass = as_vector(values, what, layer).to(MASS_DTYPE)
    _refuse_values(
        mass, ~(torch.isfinite(mass) & (mass >= 0)), f"The {what} of layer {layer!r}", "finite and at least 0"
    )
    return mass


def _refuse_values(values: Tensor, bad: Tensor, name: str, kind: str) -> None:
    for value, is_bad in zip(values.tolist(), bad.tolist(), strict=True):
        if is_bad:
            raise must_be(name, kind, value)


def check_layers_match(first: Iterable[str], second: Iterable[str], both: str, advice: str) -> None:
    """Raise `SieveError` unless two things, called `both` in the error, are of the same layers."""
    only_one = sorted(set(first) ^ set(second))
    if only_one:
        raise SieveError(f"Only one of {both} has {listed(only_one)}. {advice}")


def check_experts_match(first: Mapping[str, Tensor], second: Mapping[str, Tensor], both: str, advice: str) -> None:
    """As `check_layers_match`, and unless their layers have as many experts."""
    check_layers_match(first, second, both, advice)
    for name, layer in first.items():
        if len(layer) != len(second[name]):
            numbers = f"{len(layer)} and {len(second[name])}"
            raise SieveError(f"The experts of layer {name!r} are {numbers} in {both}. {advice}")


def as_json(metadata: Any) -> dict[str, Any]:
    """Metadata as they come back from JSON: a copy, with lists in place of tuples."""
    if not isinstance(metadata, Mapping):
        raise must_be("metadata", "a dict", metadata)
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SieveError(f"metadata cannot be stored as JSON: {one_line(error)}. Convert such values first.") from error
