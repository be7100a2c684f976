"""Two real processes, connected by gloo on loopback, that run one of the modules beside this file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The workers end by themselves before that, also if they hang.
BACKSTOP_SECONDS = 170


def run_pair(module: str, folder: Path) -> Path:
    """Run `python -m module folder` on both ranks until they end; each leaves its results and `log.RANK` there."""
    command = [sys.executable, "-W", "ignore", "-m", module, str(folder)]
    processes = []
    try:
        for rank in range(2):
            with open(folder / f"log.{rank}", "wb") as log:
                processes.append(
                    subprocess.Popen(command, env=_environment(rank), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                )
        for process in processes:
            process.wait(BACKSTOP_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


def _environment(rank: int) -> dict[str, str]:
    """That of torchrun, one thread a process, and no network but loopback."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
        "HF_HUB_OFFLINE": "1",
    }
