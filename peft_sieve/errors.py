"""The one exception family of the package."""


class SieveError(ValueError):
    """An error that the caller can put right.

    Its text is one sentence: what was received, what was expected, what to do.
    It derives from `ValueError`, so code that guards PEFT calls with `except ValueError` keeps working.
    """
