"""One file written whole or not at all. What `replaced_when_done` does is tested where adapters are saved."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from peft_sieve import SieveError
from peft_sieve.files import write_file


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
