"""PEFT's own settings, checked before PEFT or a model sees them: it finds out in the middle of an injection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...checks import is_whole, must_be, number, shown, whole
from ...errors import SieveError

# More than the widest layers have features, and little enough to count with.
_MOST_RANK = 2**20


def check_names(config: Any) -> None:
    """Check the settings that name modules and layers, as far as a configuration has them.

    Raises:
        SieveError: one is of another type, or a pattern is not a regular expression.
    """
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            _check_regex(name, value)
        elif not _all_of(str, value):
            raise must_be(name, "a list of names, a pattern or None", value)
    for name in ("modules_to_save", "target_parameters"):
        value = getattr(config, name, None)
        if not _all_of(str, value):
            raise must_be(name, "a list of names or None", value)
    value = getattr(config, "layers_to_transform", None)
    if not is_whole(value) and not _all_of(int, value):
        raise must_be("layers_to_transform", "a layer's index, a list of them or None", value)
    value = getattr(config, "trainable_token_indices", None)
    for ids in value.values() if isinstance(value, Mapping) else [] if value is None else [value]:
        if not ids or not _all_of(int, ids) or min(ids) < 0:
            kind = "a list of token ids, a mapping from embeddings to such lists, or None"
            raise must_be("trainable_token_indices", kind, value)


def rank(name: str, value: Any) -> Any:
    """`value` as a plain int that can be a rank.

    Raises:
        SieveError: it is not a positive whole number, or above every width of a layer.
    """
    return whole(name, value, most=_MOST_RANK)


def check_patterns(config: Any) -> None:
    """Check `rank_pattern` and `alpha_pattern`.

    Raises:
        SieveError: one is not a mapping from regular expressions to numbers that can be a rank or an alpha.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
            raise must_be(name, "a mapping from names or patterns", patterns)
        for key, value in patterns.items():
            _check_regex(name, key)
            if name == "rank_pattern":
                rank(f"{name}[{shown(key)}]", value)
            else:
                number(f"{name}[{shown(key)}]", value, lambda alpha: True, "a finite number")


def _all_of(kind: type, value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise SieveError(f"{name} has {shown(pattern)}, which is not a regular expression ({error}).") from error
