"""Runs the code of pages as a reader would: block after block, each page's Python in names of its own.

python -m tests.pages README.md docs/serving.md     # in a folder with examples/ and tests/
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each line; one that ends in a backslash goes on."""
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def run(page: Path) -> None:
    """Run the Python blocks and the `peft-sieve` commands of a page in the folder that this process is in."""
    from peft_sieve.cli import main

    names: dict[str, Any] = {"__name__": page.stem.replace("-", "_")}
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, str(page), "exec", dont_inherit=True), names)  # without this file's __future__
        elif language == "sh":
            for program, *words in commands(block):
                assert program == "peft-sieve", f"{page}: {program}"
                assert main(words) == 0, f"{page}: {words}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"--- {argument}", flush=True)
        run(ROOT / argument)
