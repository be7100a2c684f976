"""What a call of a tokenizer leaves behind in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TOO_LONG_WARNING = "sequence-length-is-longer-than-the-specified-maximum"


@contextmanager
def settings_restored(tokenizer: Any) -> Iterator[None]:
    """Leaves the tokenizer as it was: a call changes truncation and padding, which are saved with its file."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    warned = getattr(tokenizer, "deprecation_warnings", None)
    before = dict(warned) if warned is not None else {}
    if warned is not None:
        warned[_TOO_LONG_WARNING] = True  # samples are cut after tokenising: the warning would mislead
    try:
        yield
    finally:
        if backend is not None:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()
        if warned is not None:
            warned.clear()
            warned.update(before)
