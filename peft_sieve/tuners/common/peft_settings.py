"""PEFT's own settings, checked before PEFT or a model sees them: it finds out in the middle of an injection."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import SieveError


def check_names(config: Any) -> None:
    """Check the settings that name modules and layers, as far as a configuration has them.

    Raises:
        SieveError: one is of another type, or a pattern is no regular expression.
    """
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            _check_regex(name, value)
        elif not _all_of(str, value):
            raise SieveError(f"{name} is {_shown(value)}, expected a list of names, a pattern or None: pass one")
    value = getattr(config, "modules_to_save", None)
    if not _all_of(str, value):
        raise SieveError(f"modules_to_save is {_shown(value)}, expected a list of names or None: pass one")
    value = getattr(config, "layers_to_transform", None)
    if isinstance(value, bool) or not (isinstance(value, int) or _all_of(int, value)):
        raise SieveError(f"layers_to_transform is {_shown(value)}, expected a layer's index, a list or None: pass one")


def check_patterns(config: Any) -> None:
    """Check `rank_pattern` and `alpha_pattern`.

    Raises:
        SieveError: one is no mapping from regular expressions to numbers that can be a rank or an alpha.
    """
    for name, kinds, expected in (
        ("rank_pattern", int, "a positive whole number"),
        ("alpha_pattern", int | float, "a finite number"),
    ):
        patterns = getattr(config, name)
        if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
            raise SieveError(f"{name} is {_shown(patterns)}, expected a mapping from names or patterns: pass one")
        for key, value in patterns.items():
            _check_regex(name, key)
            number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (kinds is int and value < 1):
                raise SieveError(f"{name}[{key!r}] is {_shown(value)}, expected {expected}: pass one")


def check_flags(config: Any, names: Iterable[str]) -> None:
    """Check settings that are True or False: of a string such as "false" Python would make True.

    Raises:
        SieveError: one is neither.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise SieveError(f"{name} is {_shown(value)}, expected True or False: pass one")


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
        raise SieveError(
            f"{name} has {pattern!r}, which is no regular expression ({error}), expected a name or a pattern: correct "
            "it"
        ) from error


def _shown(value: Any) -> str:
    return reprlib.repr(value)
