"""Every module here computes on one thread."""

from tests.test_training import one_thread  # noqa: F401
