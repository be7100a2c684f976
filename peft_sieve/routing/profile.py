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

from ..checks import must_be, whole
from ..errors import SieveError
from ..table import UNKNOWN, Table
from . import profile_file
from .profile_fields import (
    WEIGHTS,
    as_counts,
    as_json,
    as_mass,
    as_rows,
    check_experts_match,
    checked_names,
    per_layer,
)


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
        checked: dict[str, Any] = {"counts": counts, "metadata": as_json(self.metadata)}
        for what in WEIGHTS:
            if getattr(self, what) is not None:
                weights = per_layer(getattr(self, what), what, partial(as_mass, what=what))
                check_experts_match(counts, weights, f"counts and {what}", f"Pass both for each layer, or no {what}.")
                checked[what] = {name: weights[name] for name in counts}
        for name, least in (("num_tokens", 0), ("num_experts_per_tok", 1), ("num_samples", 0)):
            checked[name] = whole(name, getattr(self, name), least=least, optional=True)
        most_experts = max(layer.numel() for layer in counts.values())
        if (checked["num_experts_per_tok"] or 0) > most_experts:
            kind = f"at most {most_experts}, the experts of the largest layer"
            raise must_be("num_experts_per_tok", kind, self.num_experts_per_tok)
        # Frozen for everybody else: this is where the values become what the annotations say.
        for name, value in checked.items():
            object.__setattr__(self, name, value)

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
            layer_names: one distinct name per layer; `layers.0`, `layers.1`, ... by default.
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
        weights: dict[str, Any] = {"mass": mass, "sample_share": sample_share, "sample_mass": sample_mass}
        for what, array in weights.items():
            if array is not None:
                weight_rows = as_rows(array, what)
                if len(weight_rows) != len(rows):
                    numbers = f"{what} has {len(weight_rows)} layers and counts has {len(rows)}"
                    raise SieveError(f"{numbers}. Pass arrays of the same shape.")
                weights[what] = dict(zip(names, weight_rows, strict=True))
        top_k = whole("num_experts_per_tok", num_experts_per_tok, optional=True)
        num_tokens = max(int(layer.sum()) for layer in by_layer.values()) // top_k if top_k else None
        return cls(counts=by_layer, num_tokens=num_tokens, num_experts_per_tok=top_k, **weights)

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
        advice = "Add profiles of the same model."
        check_experts_match(self.counts, other.counts, "the two profiles", advice)
        top_ks = [each.num_experts_per_tok for each in (self, other) if each.num_experts_per_tok is not None]
        if len(set(top_ks)) > 1:
            raise SieveError(f"num_experts_per_tok of the two profiles is {top_ks[0]} and {top_ks[1]}. {advice}")
        mass = None
        if self.mass is not None and other.mass is not None:
            mass = {name: layer + other.mass[name] for name, layer in self.mass.items()}
        return RoutingProfile(
            counts={name: layer + other.counts[name] for name, layer in self.counts.items()},
            mass=mass,
            num_tokens=_sum_if_known(self.num_tokens, other.num_tokens),
            num_experts_per_tok=top_ks[0] if top_ks else None,
            sample_share=_averaged(self, other, "sample_share"),
            sample_mass=_averaged(self, other, "sample_mass"),
            num_samples=_sum_if_known(self.num_samples, other.num_samples),
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
            and all(_same_tensors(getattr(self, what) or {}, getattr(other, what) or {}) for what in WEIGHTS)
        )

    def __repr__(self) -> str:
        sizes = sorted({layer.numel() for layer in self.counts.values()})
        experts = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        top_k = "" if self.num_experts_per_tok is None else f", top-{self.num_experts_per_tok}"
        tokens = "" if self.num_tokens is None else f", {self.num_tokens:,} tokens"
        mass = "with" if self.mass is not None else "without"
        return f"RoutingProfile({len(self.counts)} layers x {experts} experts{top_k}{tokens}, {mass} mass)"

    def to_table(self) -> Table:
        """One row per layer: its experts, the tokens routed to them (a token counts once for each expert that it goes
        to), the most used expert, and the share that it gets."""
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


def _sum_if_known(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


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
        advice = "Make one with profile_routing, RoutingProfile.load or RoutingProfile.from_arrays."
        raise must_be("The profile", "a RoutingProfile", profile, advice)
