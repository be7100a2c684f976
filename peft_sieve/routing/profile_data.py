"""What a router did: the counts and gate weights that profiling collects, as plain tensors with a file format."""

from __future__ import annotations

import hashlib
import html
import json
import os
import reprlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from peft_sieve.errors import SieveError
from peft_sieve.table import UNKNOWN, Table

# A profile without averages over samples is written as version 1, which every release reads.
FORMAT_VERSION, FORMAT_WITH_AVERAGES = 1, 2
HEADER_KEY = "peft_sieve_routing_profile"  # under it lies the JSON header in the safetensors string metadata
# Loaded tensors must have these types; see `_header` for the JSON header beside them.
COUNTS_PREFIX, COUNTS_DTYPE = "counts.", torch.int64
MASS_PREFIX, MASS_DTYPE = "mass.", torch.float64
_PREFIXES = {"mass": MASS_PREFIX, "sample_share": "sample_share.", "sample_mass": "sample_mass."}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RoutingProfile:
    """How often, and with what weight, each layer's router chose each expert (MoE-Sieve §3).

    The tensors are copied to the CPU when the profile is made. Layers may have different numbers of experts; their
    order is that of `counts`. Two profiles are equal when their numbers are, whatever the order of their layers and
    whatever their metadata.

    Args:
        counts: layer name -> number of tokens routed to each expert, `(num_experts,)`, whole numbers >= 0.
            Becomes int64.
        mass: layer name -> sum of the gate weights given to each expert, `(num_experts,)`, finite and >= 0, for the
            same layers as `counts`; None when unknown. Becomes float64.
        num_tokens: tokens profiled, >= 0; None when unknown.
        num_experts_per_tok: the router's top-k, >= 1; None when unknown.
        sample_share: layer name -> what each expert gets of a sample's tokens, a selection counting as 1/top-k of its
            token, as the mean over samples: `(num_experts,)`, finite and >= 0 (ESFT's token score, arXiv 2407.01906).
            None when unknown. Becomes float64.
        sample_mass: the same with the gate weight, 0 for experts that are not selected (ESFT's gate score).
        num_samples: samples that the means are over, >= 0; None when unknown.
        metadata: provenance, anything that JSON can hold (it is stored as JSON would: tuples become lists).

    Raises:
        SieveError: if a value is not of this form.
    """

    counts: dict[str, Tensor]
    mass: dict[str, Tensor] | None = None
    num_tokens: int | None = None
    num_experts_per_tok: int | None = None
    sample_share: dict[str, Tensor] | None = None
    sample_mass: dict[str, Tensor] | None = None
    num_samples: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = _per_layer(self.counts, "counts", _as_counts)
        weights = {}
        for what in _PREFIXES:
            given = getattr(self, what)
            layers = None if given is None else _per_layer(given, what, partial(_as_mass, what=what))
            if layers is not None:
                _check_same_layers(counts, layers, what)
                layers = {name: layers[name] for name in counts}
            weights[what] = layers
        _check_whole("num_samples", self.num_samples, minimum=0)
        _check_whole("num_tokens", self.num_tokens, minimum=0)
        _check_whole("num_experts_per_tok", self.num_experts_per_tok, minimum=1)
        most_experts = max(layer.numel() for layer in counts.values())
        if self.num_experts_per_tok is not None and self.num_experts_per_tok > most_experts:
            raise SieveError(
                f"received num_experts_per_tok={self.num_experts_per_tok} for layers of at most {most_experts} "
                "experts, expected no more than the experts of a layer: pass the router's top-k"
            )
        # Frozen for everybody else: this is where the values become what the annotations say.
        object.__setattr__(self, "counts", counts)
        for what, layers in weights.items():
            object.__setattr__(self, what, layers)
        for name in ("num_tokens", "num_experts_per_tok", "num_samples"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        object.__setattr__(self, "metadata", _as_json(self.metadata))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers' names, in order."""
        return tuple(self.counts)

    @classmethod
    def from_arrays(
        cls,
        counts: Any,
        mass: Any = None,
        *,
        num_experts_per_tok: int | None = None,
        layer_names: Sequence[str] | None = None,
        sample_share: Any = None,
        sample_mass: Any = None,
    ) -> RoutingProfile:
        """A profile from numbers that were collected elsewhere.

        Args:
            counts: tensor, NumPy array or nested lists of shape `(layers, experts)`; a list of rows may be ragged.
            mass: the same for the summed gate weights, or None when unknown.
            num_experts_per_tok: the router's top-k. From it follows `num_tokens`: the largest layer total divided by
                it, rounded down; without it `num_tokens` is None.
            layer_names: one distinct name a layer; `layers.0`, `layers.1`, ... by default.
            sample_share: average over samples, as `counts`, or None when unknown (see `RoutingProfile`).
            sample_mass: the same of the gate weights.

        Returns:
            The profile, with empty metadata.

        Raises:
            SieveError: if shapes, names or values do not fit (see `RoutingProfile`).
        """
        rows = _rows(counts, "counts")
        names = _checked_names(layer_names, len(rows))
        by_layer = {name: _as_counts(row, name) for name, row in zip(names, rows, strict=True)}
        weights: dict[str, Any] = {}
        for what, array in {"mass": mass, "sample_share": sample_share, "sample_mass": sample_mass}.items():
            weight_rows = None if array is None else _rows(array, what)
            if weight_rows is not None and len(weight_rows) != len(rows):
                raise SieveError(
                    f"received {what} for {len(weight_rows)} layers and counts for {len(rows)}, "
                    "expected as many: pass two arrays of shape (layers, experts) from the same run"
                )
            weights[what] = None if weight_rows is None else dict(zip(names, weight_rows, strict=True))
        _check_whole("num_experts_per_tok", num_experts_per_tok, minimum=1)
        num_tokens = None
        if num_experts_per_tok is not None:
            num_tokens = max(int(layer.sum()) for layer in by_layer.values()) // int(num_experts_per_tok)
        return cls(counts=by_layer, num_tokens=num_tokens, num_experts_per_tok=num_experts_per_tok, **weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as one safetensors file, whole or not at all.

        The file holds `counts.<layer>`, `mass.<layer>`, `sample_share.<layer>` and `sample_mass.<layer>`, as far as
        they are known, and a JSON header with a format version and a digest. It
        appears under `path` in one step, so that a crash or a full disk never leaves half a profile.

        Args:
            path: file to write, in a folder that exists; an older file there is replaced.

        Raises:
            SieveError: if nothing can be written there.
        """
        tensors = {COUNTS_PREFIX + name: layer for name, layer in self.counts.items()}
        for what, prefix in _PREFIXES.items():
            tensors |= {prefix + name: layer for name, layer in (getattr(self, what) or {}).items()}
        blob = to_safetensors(tensors, metadata={HEADER_KEY: json.dumps(_header(self))})
        target = _as_path(path)
        scratch = target.parent / f".{uuid.uuid4().hex}.tmp"  # same folder, so the same file system
        try:
            with open(scratch, "xb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        except OSError as error:
            raise SieveError(
                f"could not write the routing profile to {target} ({error.strerror or error}), "
                "expected a file name in a writable folder: create the folder or choose another path"
            ) from error
        finally:
            with suppress(OSError):  # after os.replace there is nothing left to remove
                scratch.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingProfile:
        """Read a profile that `save` wrote.

        Args:
            path: the file.

        Returns:
            The profile, bit for bit the one that was saved.

        Raises:
            SieveError: if the file is missing, truncated, altered, of a later format, or something else.
        """
        source = _as_path(path)
        try:
            with safe_open(source, framework="pt", device="cpu") as file:
                header = _parsed_header((file.metadata() or {}).get(HEADER_KEY))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return _from_file(header, tensors)
        except (OSError, SafetensorError, _BadFile, SieveError) as error:
            raise SieveError(
                f"could not read a routing profile from {source} ({_one_line(error)}), expected an unaltered file "
                "written by RoutingProfile.save: check the path, copy the file again or profile again"
            ) from error

    def __add__(self, other: RoutingProfile) -> RoutingProfile:
        """Both profiles' tokens together, as if profiled in one run: layer order of the left one.

        The mass is known if both are; averages over samples are those over both profiles' samples, known if both sides'
        averages and their numbers of samples are. The metadata becomes `{"parts": [...]}` with the metadata of every
        part.

        Raises:
            SieveError: if layers, numbers of experts or the router's top-k differ.
        """
        if not isinstance(other, RoutingProfile):
            return NotImplemented
        only_one = sorted(set(self.counts) ^ set(other.counts))
        if only_one:
            raise SieveError(
                f"received two profiles of which only one has {quoted(only_one)}, "
                "expected the same layers in both: add profiles of the same model"
            )
        for name, layer in self.counts.items():
            if layer.shape != other.counts[name].shape:
                raise SieveError(
                    f"received {layer.numel()} and {other.counts[name].numel()} experts in layer {name!r}, "
                    "expected as many in both profiles: add profiles of the same model"
                )
        top_ks = {self.num_experts_per_tok, other.num_experts_per_tok} - {None}
        if len(top_ks) > 1:
            raise SieveError(
                f"received profiles with num_experts_per_tok {self.num_experts_per_tok} and "
                f"{other.num_experts_per_tok}, expected the same: add profiles of the same model"
            )
        known = self.num_tokens is not None and other.num_tokens is not None
        return RoutingProfile(
            counts={name: layer + other.counts[name] for name, layer in self.counts.items()},
            mass=None
            if self.mass is None or other.mass is None
            else {name: layer + other.mass[name] for name, layer in self.mass.items()},
            num_tokens=self.num_tokens + other.num_tokens if known else None,  # type: ignore[operator]
            num_experts_per_tok=next(iter(top_ks), None),
            sample_share=_averaged(self, other, "sample_share"),
            sample_mass=_averaged(self, other, "sample_mass"),
            num_samples=None
            if self.num_samples is None or other.num_samples is None
            else self.num_samples + other.num_samples,
            metadata={"parts": _parts(self) + _parts(other)},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingProfile):
            return NotImplemented
        return (
            self.num_tokens == other.num_tokens
            and self.num_experts_per_tok == other.num_experts_per_tok
            and self.num_samples == other.num_samples
            and _same_tensors(self.counts, other.counts)
            and all(_same_tensors(getattr(self, what) or {}, getattr(other, what) or {}) for what in _PREFIXES)
        )

    def __repr__(self) -> str:
        sizes = sorted({layer.numel() for layer in self.counts.values()})
        experts = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        top_k = "" if self.num_experts_per_tok is None else f", top-{self.num_experts_per_tok}"
        tokens = "" if self.num_tokens is None else f", {self.num_tokens:,} tokens"
        mass = "with" if self.mass is not None else "without"
        return f"RoutingProfile({len(self.counts)} layers x {experts} experts{top_k}{tokens}, {mass} mass)"

    def to_table(self) -> Table:
        """One row a layer: its experts, the tokens routed to them (each counts once for every expert that it goes to),
        the most used expert, and the share that it gets."""
        rows = []
        for name, counts in self.counts.items():
            routed, hottest = int(counts.sum()), int(counts.argmax())
            top = (str(hottest), f"{int(counts[hottest]) / routed:.1%}") if routed else (UNKNOWN, UNKNOWN)
            rows.append((name, str(counts.numel()), f"{routed:,}", *top))
        return Table(("layer", "experts", "routed", "hottest expert", "its share"), rows)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>\n{self.to_table().to_html()}"


# --- values ---------------------------------------------------------------------------------------------------------


def _rows(array: Any, what: str) -> list[Any]:
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


def _checked_names(layer_names: Sequence[str] | None, num_layers: int) -> list[str]:
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


def _per_layer(values: Any, what: str, convert: Callable[[Any, str], Tensor]) -> dict[str, Tensor]:
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


def _as_vector(values: Any, what: str, layer: str) -> Tensor:
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
            f"received {what} for layer {layer!r} that are not numbers of shape (num_experts,) ({_one_line(error)}), "
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


def _as_counts(values: Any, layer: str) -> Tensor:
    vector = _as_vector(values, "counts", layer)
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


def _as_mass(values: Any, layer: str, what: str = "mass") -> Tensor:
    mass = _as_vector(values, what, layer).to(MASS_DTYPE)
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


def _check_same_layers(counts: Mapping[str, Tensor], mass: Mapping[str, Tensor], what: str) -> None:
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


def _check_whole(what: str, value: Any, *, minimum: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise SieveError(
            f"received {what}={reprlib.repr(value)}, expected a whole number of at least {minimum} or None: "
            "leave it out if it is unknown"
        )


def _as_json(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise SieveError(
            f"received metadata of type {type(metadata).__name__}, expected a dict: pass {{}} if there is none"
        )
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SieveError(
            f"received metadata that JSON cannot hold ({_one_line(error)}), expected strings, finite numbers, "
            "booleans, None, lists and dicts: convert the other values"
        ) from error


def _same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(layer, right[name]) for name, layer in left.items())


def _averaged(first: RoutingProfile, second: RoutingProfile, what: str) -> dict[str, Tensor] | None:
    """Averages over the samples of two profiles together; None if either side's, or their weights, are unknown."""
    one, other = getattr(first, what), getattr(second, what)
    if one is None or other is None or first.num_samples is None or second.num_samples is None:
        return None
    total = max(first.num_samples + second.num_samples, 1)
    shares = first.num_samples / total, second.num_samples / total
    return {name: one[name] * shares[0] + other[name] * shares[1] for name in one}


def _parts(profile: RoutingProfile) -> list[Any]:
    """The metadata of the runs that a profile is the sum of."""
    parts = profile.metadata.get("parts")
    return parts if isinstance(parts, list) and len(profile.metadata) == 1 else [profile.metadata]


# --- for error texts, here and in the modules that use profiles -----------------------------------------------------


def check_profile(profile: Any) -> None:
    """Raise `SieveError` unless `profile` is a `RoutingProfile`."""
    if not isinstance(profile, RoutingProfile):
        raise SieveError(
            f"received {type(profile).__name__} as a profile, expected a RoutingProfile: "
            "make one with profile_routing, RoutingProfile.load or RoutingProfile.from_arrays"
        )


def quoted(names: Iterable[str]) -> str:
    """Names as an error shows them: `'a', 'b'`."""
    return ", ".join(repr(name) for name in names)


# --- the file -------------------------------------------------------------------------------------------------------


class _BadFile(Exception):
    """Why a file is no routing profile: becomes part of the `SieveError` that `RoutingProfile.load` raises."""


def _header(profile: RoutingProfile) -> dict[str, Any]:
    """The JSON header of a profile's file.

    safetensors keeps no order, so the header does. Its digest covers the header and the numbers: an altered or
    damaged file is told from an intact one even where its form is right.
    """
    header: dict[str, Any] = {
        "version": FORMAT_WITH_AVERAGES if _has_averages(profile) else FORMAT_VERSION,
        "layers": list(profile.counts),
        "num_tokens": profile.num_tokens,
        "num_experts_per_tok": profile.num_experts_per_tok,
        "metadata": profile.metadata,
    }
    described = [profile.counts, profile.mass]
    if _has_averages(profile):
        header["num_samples"] = profile.num_samples
        described += [profile.sample_share, profile.sample_mass]
    numbers = [{name: layer.tolist() for name, layer in (tensors or {}).items()} for tensors in described]
    digest = hashlib.sha256(json.dumps([header, numbers], sort_keys=True).encode()).hexdigest()
    return header | {"digest": digest}


def _has_averages(profile: RoutingProfile) -> bool:
    return any(value is not None for value in (profile.sample_share, profile.sample_mass, profile.num_samples))


def _parsed_header(text: str | None) -> dict[str, Any]:
    if text is None:
        raise _BadFile("it has no routing-profile header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadFile("its header is not JSON") from error
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise _BadFile("its header names no format version")
    if header["version"] not in (FORMAT_VERSION, FORMAT_WITH_AVERAGES):
        raise _BadFile(
            f"it has format version {header['version']} where this release of peft_sieve reads {FORMAT_VERSION} and "
            f"{FORMAT_WITH_AVERAGES}"
        )
    layers = header.get("layers")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise _BadFile("its header lists no layers")
    return header


def _from_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RoutingProfile:
    layers = header["layers"]
    count_keys = {COUNTS_PREFIX + name for name in layers}
    known = {what: prefix for what, prefix in _PREFIXES.items() if any(key.startswith(prefix) for key in tensors)}
    if set(tensors) != count_keys | {prefix + name for prefix in known.values() for name in layers}:
        raise _BadFile("its tensors are not those of the layers that its header lists")
    for key, tensor in tensors.items():
        if tensor.dtype != (COUNTS_DTYPE if key in count_keys else MASS_DTYPE):
            raise _BadFile(f"its tensor {key!r} has the type {tensor.dtype}")
    weights = {what: {name: tensors[prefix + name] for name in layers} for what, prefix in known.items()}
    profile = RoutingProfile(
        counts={name: tensors[COUNTS_PREFIX + name] for name in layers},
        num_tokens=header.get("num_tokens"),
        num_experts_per_tok=header.get("num_experts_per_tok"),
        num_samples=header.get("num_samples"),
        metadata=header.get("metadata"),  # type: ignore[arg-type]
        **weights,
    )
    if header != _header(profile):
        raise _BadFile("its contents do not match the digest in its header")
    return profile


def _as_path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError as error:
        raise SieveError(
            f"received {reprlib.repr(path)} as a path, expected a string or a path object: pass the file's name"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
