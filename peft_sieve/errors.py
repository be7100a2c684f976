"""The one exception family of the package."""

import torch


class SieveError(ValueError):
    """An error that the caller can put right.

    Its text is short: what is wrong, with the value, and what to do, where that is not obvious.
    It derives from `ValueError`, so code that guards PEFT calls with `except ValueError` keeps working.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether a machine ran out of memory, which no input is to blame for."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
