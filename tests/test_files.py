"""One file written whole or not at all. What `replaced_when_done` does is tested where adapters are saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from peft_sieve import SieveError
from peft_sieve.files import COMPLETE, finish_interrupted_save, replaced_when_done, write_file


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old", "test")
    with path.open("rb") as older:
        write_file(path, b"new", "test")
        assert (older.read(), path.read_bytes()) == (b"old", b"new")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SieveError, match=r"The test cannot be written to .*file \(No space left on device\)"):
        write_file(path, b"newer", "test")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    write_file(path, b"content", "test")
    reader.join()
    assert received == [b"content"]
    assert path.is_fifo()


def test_what_a_killed_process_left_is_removed_by_the_next_but_not_what_another_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    child = os.fork()
    if not child:  # killed when all is written and nothing is in place
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_file(path, b"first", "test")
    os.waitpid(child, 0)
    (scratch,) = tmp_path.iterdir()
    write_file(path, b"second", "test")
    assert scratch.exists(), "it may be of a process that is still at work"
    long_ago = time.time() - 86_400
    os.utime(scratch, (long_ago, long_ago))
    write_file(path, b"third", "test")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"third"


def test_a_save_whose_files_cannot_be_moved_is_told_of(tmp_path: Path) -> None:
    """As on a disk that has become read-only since the save was killed."""
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / "file").write_bytes(b"new")
    (tmp_path / "file").mkdir()  # which no file can replace
    for act in (finish_interrupted_save, lambda folder: replaced_when_done(folder, "test").__enter__()):
        with pytest.raises(SieveError, match=r"holds a complete save.*cannot be moved into .* \(Is a directory\)"):
            act(tmp_path)
    assert (tmp_path / COMPLETE / "file").read_bytes() == b"new"


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(SieveError, match="The test cannot be written to .*adapter .Not a directory"),
        replaced_when_done(tmp_path / "file" / "adapter", "test"),
    ):
        pass
