"""Every module here computes on one thread; the data of whole runs."""

from tests.training.runs import one_thread, texts, tokens  # noqa: F401
