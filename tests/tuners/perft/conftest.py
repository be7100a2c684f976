"""Every module here computes on one thread; the data of whole runs."""

from tests.test_training import one_thread, texts, tokens  # noqa: F401
