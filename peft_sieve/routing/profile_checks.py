"""What a routing profile is made of, checked and converted: each error says what was received and expected."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import SieveError

COUNTS_DTYPE, MASS_DTYPE = torch.int64, torch.float64


def as_rows(array: Any, what: str) -> list[Any]:
    """The layers of a `(layers, experts)` tensor, array or nested list; rows of a list may differ in length."""
    if isinstance(array, (str, bytes, Mapping)) or not isinstance(array, Iterable):
        raise SieveError(
            f"received {what} as {type(array).__name__}, expected an array of shape (layers, experts): "
            "pass a tensor, a NumPy array or one list a layer"
        )
    try:
        rows = list(array)
    except TypeError:  # a tensor or array without dimensions
        rows = []
    if not rows:
        raise SieveError(
            f"received {what} without rows, expected an array of shape (layers, experts): "
            "pass one row of experts a layer"
        )
    return rows


def checked_names(layer_names: Sequence[str] | None, num_layers: int) -> list[str]:
    """One distinct name a layer; `layers.0`, `layers.1`, ... by default."""
    if layer_names is None:
        return [f"layers.{index}" for index in range(num_layers)]
    names = [layer_names] if isinstance(layer_names, str) else list(layer_names)
    if len(names) != num_layers:
        raise SieveError(
            f"received {len(names)} layer names for {num_layers} layers, expected one a layer: pass as many names"
        )
    duplicates = [name for index, name in enumerate(names) if name in names[:index]]
    if duplicates:
        raise SieveError(
            f"received the layer name {duplicates[0]!r} more than once, expected distinct names: rename one of them"
        )
    return names


def per_layer(values: Any, what: str, convert: Callable[[Any, str], Tensor]) -> dict[str, Tensor]:
    """A mapping from layer name to what `convert(values, name)` makes of its values; `what` they are, for errors."""
    if not isinstance(values, Mapping) or not values:
        given = "no layers" if isinstance(values, Mapping) else type(values).__name__
        raise SieveError(
            f"received {given} as {what}, expected a mapping from layer name to tensor with at least one layer: "
            "use RoutingProfile.from_arrays for arrays of shape (layers, experts)"
        )
    for name in values:
        if not isinstance(name, str) or not name:
            raise SieveError(
                f"received {name!r} as the name of a layer, expected a non-empty string: "
                "name layers by the path of their experts module"
            )
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
        raise SieveError(
            f"received {what} for layer {layer!r} that are not numbers of shape (num_experts,) ({one_line(error)}), "
            "expected one number an expert: pass a tensor, a NumPy array or a list of numbers"
        ) from error
    if vector.dim() != 1 or vector.numel() == 0:
        raise SieveError(
            f"received {what} of shape {tuple(vector.shape)} for layer {layer!r}, expected (num_experts,): "
            "pass one row of experts a layer"
        )
    if vector.dtype == torch.bool or vector.is_complex():
        raise SieveError(
            f"received {what} of type {vector.dtype} for layer {layer!r}, expected numbers: "
            "pass counts as integers and mass as floats"
        )
    return vector


def as_counts(values: Any, layer: str) -> Tensor:
    """Whole numbers of at least 0, `(num_experts,)`, int64."""
    vector = as_vector(values, "counts", layer)
    counts = vector.to(COUNTS_DTYPE)
    if vector.is_floating_point() and not torch.equal(counts.to(torch.float64), vector.to(torch.float64)):
        raise SieveError(
            f"received counts with fractions, NaN or infinity for layer {layer!r}, expected whole numbers: "
            "pass the number of tokens routed to each expert, and gate weights as mass"
        )
    if bool((counts < 0).any()):
        raise SieveError(
            f"received negative counts for layer {layer!r}, expected whole numbers of at least 0: "
            "pass the number of tokens routed to each expert"
        )
    return counts


def as_mass(values: Any, layer: str, what: str = "mass") -> Tensor:
    """Finite numbers of at least 0, `(num_experts,)`, float64."""
    mass = as_vector(values, what, layer).to(MASS_DTYPE)
    if not bool(torch.isfinite(mass).all()):
        raise SieveError(
            f"received NaN or infinite {what} for layer {layer!r}, expected finite numbers: "
            f"check the run in which the gate weights were summed, or leave {what} out"
        )
    if bool((mass < 0).any()):
        raise SieveError(
            f"received negative {what} for layer {layer!r}, expected numbers of at least 0: "
            f"pass {'sums' if what == 'mass' else 'averages'} of gate weights, or leave {what} out"
        )
    return mass


def check_same_layers(counts: Mapping[str, Tensor], mass: Mapping[str, Tensor], what: str) -> None:
    """Raise `SieveError` unless counts and gate weights are of the same layers and experts."""
    only_one = sorted(set(counts) ^ set(mass))
    if only_one:
        raise SieveError(
            f"received either counts or {what}, but not both, for {quoted(only_one)}, "
            f"expected the same layers in both: pass both for each layer, or no {what} at all"
        )
    for name, layer in counts.items():
        if layer.shape != mass[name].shape:
            raise SieveError(
                f"received {layer.numel()} counts and {mass[name].numel()} values of {what} for layer {name!r}, "
                "expected one of each an expert: pass arrays of the same shape"
            )


def check_whole(what: str, value: Any, *, minimum: int) -> None:
    """Raise `SieveError` unless `value` is None or a whole number of at least `minimum`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise SieveError(
            f"received {what}={reprlib.repr(value)}, expected a whole number of at least {minimum} or None: "
            "leave it out if it is unknown"
        )


def as_json(metadata: Any) -> dict[str, Any]:
    """Metadata as they come back from JSON: a copy, with lists in place of tuples."""
    if not isinstance(metadata, Mapping):
        raise SieveError(
            f"received metadata of type {type(metadata).__name__}, expected a dict: pass {{}} if there is none"
        )
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SieveError(
            f"received metadata that JSON cannot hold ({one_line(error)}), expected strings, finite numbers, "
            "booleans, None, lists and dicts: convert the other values"
        ) from error


def quoted(names: Iterable[str]) -> str:
    """Names as an error shows them: `'a', 'b'`."""
    return ", ".join(repr(name) for name in names)


def one_line(error: BaseException) -> str:
    """An error's text as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")
