"""Settings and arguments checked where they come in: one place for what a whole number, a share or a choice is.

Each error is two short sentences: what is wrong, with the value; then what to do, where that is not obvious.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from .errors import SieveError

_LARGEST = (2 - 2**-23) * 2.0**127  # of floats in 32 bits
_QUOTED = 400  # characters of another error's text


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, of Python or NumPy, NaN and infinity included; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(
    name: str, value: Any, *, least: int | None = 1, most: int | None = None, optional: bool = False, advice: str = ""
) -> Any:
    """`value` as a plain int, so that JSON takes it; None if `optional` and it is None.

    Raises:
        SieveError: it is not a whole number, less than `least`, or more than `most`.
    """
    if optional and value is None:
        return None
    if not is_whole(value) or (least is not None and value < least):
        kind = {None: "a whole number", 1: "a positive whole number"}.get(least, f"a whole number of at least {least}")
        raise must_be(name, kind + (" or None" if optional else ""), value, advice)
    if most is not None and value > most:
        raise must_be(name, f"at most {most}", value, advice)
    return int(value)


def number(name: str, value: Any, fits: Callable[[float], bool], kind: str, advice: str = "") -> Any:
    """`value` as a plain int or float.

    Args:
        fits: whether a finite number is one of those wanted.
        kind: says which those are.

    Raises:
        SieveError: it is not a finite number, or does not fit.
    """
    if not is_number(value) or not _fits_a_float(value) or not fits(value):
        raise must_be(name, kind, value, advice)
    return value if isinstance(value, int | float) else float(value)


def _fits_a_float(value: Any) -> bool:
    """Whether a number is finite in 32 bits, in which models compute; whole numbers of Python have no largest."""
    return abs(value) <= _LARGEST  # also false for NaN


def share(name: str, value: Any, advice: str = "", *, optional: bool = False) -> Any:
    """`value` if it is a number in (0, 1]; None if `optional` and it is None.

    Raises:
        SieveError: it is not.
    """
    if optional and value is None:
        return None
    kind = "a number above 0 and at most 1" + (" or None" if optional else "")
    return number(name, value, lambda given: 0 < given <= 1, kind, advice)


def choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not one of `choices`.

    Raises:
        SieveError: it is not.
    """
    choices = list(choices)
    # 1 == True.
    if not any(value == known and isinstance(value, bool) is isinstance(known, bool) for known in choices):
        near = difflib.get_close_matches(value, map(str, choices), n=1, cutoff=0.5) if isinstance(value, str) else []
        raise must_be(name, f"one of {quoted(choices)}", value, f"Did you mean {near[0]!r}?" if near else "")


def flags(config: Any, names: Iterable[str]) -> None:
    """Refuse settings that are neither True nor False: Python would make True of a string such as "false".

    Raises:
        SieveError: one is neither.
    """
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise must_be(name, "True or False", getattr(config, name))


def must_be(name: str, kind: str, value: Any, advice: str = "") -> SieveError:
    """The error for a value of another kind."""
    return SieveError(f"{name} must be {kind}, got {shown(value)}." + (f" {advice}" if advice else ""))


def shown(value: Any) -> str:
    """A value as an error shows it, cut short."""
    try:
        return shortened(reprlib.repr(value))
    except ValueError:  # a number of more digits than Python writes out
        return f"a value of type {type(value).__name__} that Python does not write out"


def shortened(text: str, length: int = 80) -> str:
    """A text, cut to `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def quoted(names: Iterable[Any]) -> str:
    """Names as an error shows them: `'a', 'b'`."""
    return ", ".join(repr(name) for name in names)


def listed(names: Iterable[Any]) -> str:
    """As `quoted`, but the first three and the number of the others."""
    names = list(names)
    return quoted(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def one_line(error: BaseException) -> str:
    """An error's text as a part of a sentence, cut short; its type's name if it has none."""
    return shortened(" ".join(str(error).split()).rstrip("."), _QUOTED) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text as a part of a sentence, cut short; its type's name if it has none."""
    text = str(error).strip()
    return shortened(text.splitlines()[0].rstrip("."), _QUOTED) if text else type(error).__name__
