"""What an error of the package looks like."""

from __future__ import annotations


def assert_plain(text: str) -> None:
    """Whole sentences on one line, of a size that is read; see `peft_sieve/checks.py`."""
    assert "\n" not in text and 20 < len(text) < 900, text
    assert text.endswith((".", "?")), f"is not a sentence: {text}"
    assert ", expected " not in text, f"is not in plain words: {text}"
