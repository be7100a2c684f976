"""The one exception family of the package."""


class SieveError(ValueError):
    """An error that the caller can put right.

    Its text is short: what is wrong, with the value, and what to do, where that is not obvious.
    It derives from `ValueError`, so code that guards PEFT calls with `except ValueError` keeps working.
    """
