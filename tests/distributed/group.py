"""Run a Python script in several connected processes, as torchrun would, with a time limit."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def free_port() -> int:
    """Return a port below those that the system hands out, so that no connection takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def start(ranks: int, command: list[str], folder: Path, **environment: str) -> list[subprocess.Popen]:
    """Start `command` in `ranks` processes; the output of each goes to folder/rank-N.txt."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "methods"), os.environ.get("PYTHONPATH", "")])
    common = {
        **os.environ, "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **environment,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(ranks):
        with (folder / f"rank-{rank}.txt").open("wb") as output:
            started.append(
                subprocess.Popen(
                    command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=output, stderr=output
                )
            )
    return started


def wait(started: list[subprocess.Popen], seconds: float) -> list[int]:
    """Return the exit codes of all processes; those that are left after `seconds` are killed, and count as -9."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in started:
            if process.poll() is None:
                process.send_signal(number)
        end = time.monotonic() + GRACE
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            time.sleep(0.05)
    return [process.wait() for process in started]


def outputs(folder: Path) -> str:
    """Return the outputs of all processes, for messages."""
    return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(folder.glob("rank-*.txt")))


def run_script(ranks: int, script: Path, folder: Path, *arguments: str, seconds: float = 240) -> None:
    """Run a script in `ranks` processes, and require that all succeed."""
    codes = wait(start(ranks, [sys.executable, str(script), *arguments], folder), seconds)
    assert codes == [0] * ranks, f"exit codes {codes}\n{outputs(folder)}"
