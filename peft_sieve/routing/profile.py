"""What a router did: the counts and gate weights that profiling collects, as plain tensors with a file format."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SieveError
from ..table import UNKNOWN, Table
from . import profile_file
from .profile_checks import (
    as_counts,
    as_json,
    as_mass,
    as_rows,
    check_same_layers,
    check_whole,
    checked_names,
    per_layer,
    quoted,
)

_WEIGHTS = ("mass", "sample_share", "sample_mass")  # what a profile may hold beside its counts


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
        counts = per_layer(self.counts, "counts", as_counts)
        weights = {}
        for what in _WEIGHTS:
            given = getattr(self, what)
            layers = None if given is None else per_layer(given, what, partial(as_mass, what=what))
            if layers is not None:
                check_same_layers(counts, layers, what)
                layers = {name: layers[name] for name in counts}
            weights[what] = layers
        check_whole("num_samples", self.num_samples, minimum=0)
        check_whole("num_tokens", self.num_tokens, minimum=0)
        check_whole("num_experts_per_tok", self.num_experts_per_tok, minimum=1)
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
        object.__setattr__(self, "metadata", as_json(self.metadata))

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
        rows = as_rows(counts, "counts")
        names = checked_names(layer_names, len(rows))
        by_layer = {name: as_counts(row, name) for name, row in zip(names, rows, strict=True)}
        weights: dict[str, Any] = {}
        for what, array in {"mass": mass, "sample_share": sample_share, "sample_mass": sample_mass}.items():
            weight_rows = None if array is None else as_rows(array, what)
            if weight_rows is not None and len(weight_rows) != len(rows):
                raise SieveError(
                    f"received {what} for {len(weight_rows)} layers and counts for {len(rows)}, "
                    "expected as many: pass two arrays of shape (layers, experts) from the same run"
                )
            weights[what] = None if weight_rows is None else dict(zip(names, weight_rows, strict=True))
        check_whole("num_experts_per_tok", num_experts_per_tok, minimum=1)
        num_tokens = None
        if num_experts_per_tok is not None:
            num_tokens = max(int(layer.sum()) for layer in by_layer.values()) // int(num_experts_per_tok)
        return cls(counts=by_layer, num_tokens=num_tokens, num_experts_per_tok=num_experts_per_tok, **weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as one safetensors file, whole or not at all.

        The file holds `counts.<layer>`, `mass.<layer>`, `sample_share.<layer>` and `sample_mass.<layer>`, as far as
        they are known, and a JSON header with a format version and a digest. It appears under `path` in one step, so
        that a crash or a full disk never leaves half a profile.

        Args:
            path: file to write, in a folder that exists; an older file there is replaced.

        Raises:
            SieveError: if nothing can be written there.
        """
        profile_file.write(self, path)

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
        return profile_file.read(path, cls)

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
            and all(_same_tensors(getattr(self, what) or {}, getattr(other, what) or {}) for what in _WEIGHTS)
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


def check_profile(profile: Any) -> None:
    """Raise `SieveError` unless `profile` is a `RoutingProfile`."""
    if not isinstance(profile, RoutingProfile):
        raise SieveError(
            f"received {type(profile).__name__} as a profile, expected a RoutingProfile: "
            "make one with profile_routing, RoutingProfile.load or RoutingProfile.from_arrays"
        )
