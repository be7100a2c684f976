"""The file of a routing profile: safetensors with a JSON header that has a format version and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..checks import must_be, one_line
from ..errors import SieveError
from ..files import write_file
from .profile_fields import COUNTS_DTYPE, MASS_DTYPE, WEIGHTS

Profile = TypeVar("Profile")  # a RoutingProfile, which this module does not import: it is imported by it

# A profile without averages over samples is written as version 1, which every release reads.
FORMAT_VERSION, FORMAT_WITH_AVERAGES = 1, 2
HEADER_KEY = "peft_sieve_routing_profile"  # of the JSON header, in the safetensors metadata
_COUNTS = "counts."
_WEIGHTS = {what: f"{what}." for what in WEIGHTS}


def write(profile: Any, path: Any) -> None:
    """What `RoutingProfile.save` does."""
    tensors = {_COUNTS + name: layer for name, layer in profile.counts.items()}
    for what, prefix in _WEIGHTS.items():
        tensors |= {prefix + name: layer for name, layer in (getattr(profile, what) or {}).items()}
    blob = to_safetensors(tensors, metadata={HEADER_KEY: json.dumps(_header(profile))})
    write_file(_as_path(path), blob, "routing profile")


def read(path: Any, make: Callable[..., Profile]) -> Profile:
    """What `RoutingProfile.load` does.

    Args:
        path: the file.
        make: called with the file's fields by name, returns the profile.
    """
    source = _as_path(path)
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            header = _parsed_header((file.metadata() or {}).get(HEADER_KEY))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        profile = make(**_fields(header, tensors))
        if header != _header(profile):
            raise _BadFile("its contents do not match the digest in its header")
        return profile
    except (OSError, SafetensorError, _BadFile, SieveError) as error:
        raise SieveError(
            f"could not read a routing profile from {source}: {one_line(error)}. Check the path, copy the file again "
            "or profile again."
        ) from error


class _BadFile(Exception):
    """Why a file is not a routing profile: becomes part of the `SieveError` that `RoutingProfile.load` raises."""


def _header(profile: Any) -> dict[str, Any]:
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


def _has_averages(profile: Any) -> bool:
    return any(value is not None for value in (profile.sample_share, profile.sample_mass, profile.num_samples))


def _parsed_header(text: str | None) -> dict[str, Any]:
    if text is None:
        raise _BadFile("it has no routing-profile header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadFile("its header is not JSON") from error
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise _BadFile("its header has no format version")
    if header["version"] not in (FORMAT_VERSION, FORMAT_WITH_AVERAGES):
        raise _BadFile(
            f"this release of peft_sieve reads format versions {FORMAT_VERSION} and {FORMAT_WITH_AVERAGES}, got "
            f"{header['version']}"
        )
    layers = header.get("layers")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise _BadFile("its header has no list of layers")
    return header


def _fields(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `RoutingProfile` is made from, by name."""
    layers = header["layers"]
    count_keys = {_COUNTS + name for name in layers}
    known = {what: prefix for what, prefix in _WEIGHTS.items() if any(key.startswith(prefix) for key in tensors)}
    if set(tensors) != count_keys | {prefix + name for prefix in known.values() for name in layers}:
        raise _BadFile("its tensors are not those of the layers that its header lists")
    for key, tensor in tensors.items():
        if tensor.dtype != (COUNTS_DTYPE if key in count_keys else MASS_DTYPE):
            raise _BadFile(f"its tensor {key!r} has the type {tensor.dtype}")
    weights = {what: {name: tensors[prefix + name] for name in layers} for what, prefix in known.items()}
    numbers = {name: header.get(name) for name in ("num_tokens", "num_experts_per_tok", "num_samples", "metadata")}
    return {"counts": {name: tensors[_COUNTS + name] for name in layers}, **weights, **numbers}


def _as_path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError as error:
        raise must_be("path", "a string or a path object", path) from error
