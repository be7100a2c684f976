"""Take the Python files out of wheels that are never installed: `python -m tests.servers.unpack WHEELS TARGET`."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def unpack(wheels: Path, target: Path) -> None:
    """Each wheel's Python files in a folder of the wheel's name in `target`."""
    for wheel in sorted(wheels.glob("*.whl")):
        folder = target / wheel.name.split("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
