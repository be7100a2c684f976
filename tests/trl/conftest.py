"""Every module here computes on one thread."""

from tests.training.runs import one_thread  # noqa: F401
