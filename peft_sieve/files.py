"""Writing several files so that a crash leaves either all the old ones or all the new ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A folder of this name holds a complete save whose files were not all moved to their places yet.
COMPLETE = ".peft_sieve_saved"


@contextmanager
def replaced_when_done(directory: str | os.PathLike[str]) -> Iterator[str]:
    """A staging folder whose files take their places in `directory` when the block ends without an exception.

    Renaming the finished staging folder is the moment of commitment: before it the old files count, after it the new
    ones, and `finish_interrupted_save` moves what a crash left behind.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(target)
    staging = Path(tempfile.mkdtemp(prefix=".peft_sieve_saving_", dir=target))
    try:
        yield str(staging)
        for path in _files(staging):
            _flush(path)
        staging.rename(target / COMPLETE)
        finish_interrupted_save(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish_interrupted_save(directory: str | os.PathLike[str]) -> None:
    """Move the files of a save that was complete when its process died; nothing to do otherwise."""
    complete = Path(directory, COMPLETE)
    if not complete.is_dir():
        return
    for path in _files(complete):
        place = Path(directory, path.relative_to(complete))
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(complete, ignore_errors=True)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
