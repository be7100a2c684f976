"""Writing files so that a crash leaves either all the old ones or all the new ones."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import SieveError

# A scratch file that is older than this, in seconds, was left by a process that was killed.
_ABANDONED = 3600
# A folder of this name holds a complete save whose files were not all moved to their places yet,
COMPLETE = ".peft_sieve_saved"
# and one whose name starts like this a save that is not complete.
STAGING = ".peft_sieve_saving_"


@contextmanager
def writing(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a `SieveError` of an `OSError` in the block, which writes `what` to `path`."""
    try:
        yield
    except OSError as error:
        raise SieveError(
            f"The {what} cannot be written to {os.fspath(path)} ({error.strerror or error}). "
            "Choose another path, in a folder that exists and can be written to."
        ) from error


def write_file(path: str | os.PathLike[str], content: bytes, what: str) -> None:
    """Write one file, whole or not at all.

    Args:
        path: an older file there is replaced; a device or a pipe is written to.
        what: names the content in the error.

    Raises:
        SieveError: nothing can be written there.
    """
    target = Path(path)
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"  # same folder, so the same file system
    with writing(what, path):
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        _remove_abandoned(target)
        try:
            scratch.write_bytes(content)
            _flush(scratch)
            os.replace(scratch, target)
        finally:
            with suppress(OSError):  # after os.replace there is nothing left to remove
                scratch.unlink()


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left of their writing `target`; others may be writing it right now."""
    for scratch in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(OSError):  # another process removes it, too
            if time.time() - scratch.stat().st_mtime > _ABANDONED:
                scratch.unlink()


@contextmanager
def replaced_when_done(directory: str | os.PathLike[str], what: str) -> Iterator[str]:
    """A staging folder whose files take their places in `directory` when the block ends without an exception.

    Renaming the finished staging folder is the moment of commitment: before it the old files count, after it the new
    ones, and `finish_interrupted_save` moves what a crash left behind.

    Args:
        what: names the files in an error.

    Raises:
        SieveError: nothing can be written there. What the block raises is passed on as it is.
    """
    target = Path(directory)
    finish_interrupted_save(target)
    with writing(what, target):
        target.mkdir(parents=True, exist_ok=True)
        for abandoned in target.glob(f"{STAGING}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target))
    try:
        yield str(staging)
        with writing(what, target):
            for path in _files(staging):
                _flush(path)
            staging.rename(target / COMPLETE)
        finish_interrupted_save(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish_interrupted_save(directory: str | os.PathLike[str]) -> None:
    """Move the files of a save that was complete when its process died; nothing to do otherwise.

    Several processes may find one at the same time: what another has moved is in its place already.

    Raises:
        SieveError: the files cannot be moved, so that those of two saves lie there.
    """
    complete = Path(directory, COMPLETE)
    if not complete.is_dir():
        return
    try:
        for path in _files(complete):
            place = Path(directory, path.relative_to(complete))
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                os.replace(path, place)
    except OSError as error:
        raise SieveError(
            f"{complete} holds a complete save, interrupted before its files were in place, and they cannot be moved "
            f"into {os.fspath(directory)} ({error.strerror or error}). Move them there, or copy the folder to where it "
            "can be written to."
        ) from error
    # Only folders that are empty: by now there may be another save.
    for folder in (*sorted(filter(Path.is_dir, complete.rglob("*")), reverse=True), complete):
        with suppress(OSError):
            folder.rmdir()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
