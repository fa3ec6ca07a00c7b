"""Run a command in several processes with torchrun, as `unmask launch` does.

torchrun starts the processes, connects them and restarts them. This module adds what it does not do: it forwards
signals and waits until the processes have stopped, returns their exit code, and reports errors in one line.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from unmask.console import Console
from unmask.engine import pulse
from unmask.errors import UserError
from unmask.system import launched_process
from unmask.system.processes import STOP_SIGNALS

MODULE = "unmask"  # what the processes run; tests replace it
FAILED = 1
WATCH = 0.5  # seconds between two looks at the reported exit codes
UNUSED_SIGNAL = "SIGURG"  # given to torchrun so that it installs no handlers for the signals that are forwarded here


@dataclass(frozen=True)
class Layout:
    """Which processes run where; None for options that were not given. See `LaunchRequest`."""

    gpus: int | None = None
    processes: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    address: str | None = None

    def local_processes(self) -> int:
        """Return the number of processes on this host. Raises UserError if there are not enough GPUs."""
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.gpus is not None and self.processes is not None:
            raise UserError("got both --gpus and --processes; leave one of them out")
        if self.gpus is not None and self.gpus > found:
            raise UserError(
                f"got --gpus {self.gpus}; this host has {found}; give --gpus {found}" if found else
                f"got --gpus {self.gpus}; this host has no GPU that torch can use; give --processes N to use the CPU"
            )  # fmt: skip
        return self.gpus or self.processes or max(1, found)

    def host_and_port(self) -> tuple[str, int] | None:
        """Return the address of host 0, or None for a single host, which needs none.

        Raises UserError for contradictory options.
        """
        if self.nodes == 1 and not self.node_rank:
            return None
        if self.node_rank is not None and self.node_rank >= self.nodes:
            raise UserError(
                f"got --node-rank {self.node_rank} with --nodes {self.nodes}; expected 0 to {self.nodes - 1}"
            )
        if self.address is None or self.node_rank is None:
            raise UserError(
                f"got --nodes {self.nodes} without {'--address' if self.address is None else '--node-rank'}; expected "
                f"--node-rank 0 to {self.nodes - 1}, and the same --address HOST:PORT on every host"
            )
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"got --address {self.address}; expected HOST:PORT, for example node0:29500")
        return host, int(port)


@dataclass(frozen=True)
class Limits:
    """Numbers of restarts, and times in seconds. See `LaunchRequest`."""

    max_restarts: int = 0
    timeout: int = 60
    join_timeout: int = 900
    shutdown_timeout: int = 120


def run(command: Sequence[str], layout: Layout, limits: Limits, console: Console) -> int:
    """Run `unmask COMMAND` in several processes, and return their exit code if it is the same in all, else 1.

    Raises UserError for contradictory options and for an address that cannot be used.
    """
    processes, place = layout.local_processes(), layout.host_and_port()
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun logs every exit code other than 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[pulse.VARIABLE] = str(limits.timeout)
    arguments = ["--nproc-per-node", str(processes), "--max-restarts", str(limits.max_restarts)]
    arguments += ["--signals-to-handle", UNUSED_SIGNAL, "--rdzv-conf", f"timeout={limits.join_timeout}"]
    if place is None:
        arguments.append("--standalone")
    else:
        arguments += ["--nnodes", str(layout.nodes), "--node-rank", str(layout.node_rank)]
        arguments += ["--master-addr", place[0], "--master-port", str(place[1])]
    asked = torch_run.parse_args([*arguments, "-m", MODULE, *command])
    with tempfile.TemporaryDirectory(prefix="unmask-launch-") as folder:
        os.environ[launched_process.FOLDER] = folder
        os.environ[launched_process.LAUNCHER] = str(os.getpid())
        failures: dict[int, ProcessFailure] = {}
        with supervised(Path(folder), limits) as stop:
            try:
                torch_run.run(asked)
            except ChildFailedError as error:
                failures = error.failures
            except Exception as error:
                if not launched_process.read_codes(Path(folder)):
                    raise _explained(error, layout, limits) from error
        codes = launched_process.read_codes(Path(folder))
    return _conclude(codes, failures, processes, console, stop)


class Stop:
    """How the processes ended. killed: whether they had to be killed."""

    killed = False


@contextmanager
def supervised(folder: Path, limits: Limits) -> Iterator[Stop]:
    """Context manager that forwards the stop signals to the processes, and kills processes that do not end.

    These are processes that still run `shutdown_timeout` seconds after a signal, or `timeout` seconds after another one
    has rejected its input. Before there are any processes, a signal raises KeyboardInterrupt.
    """
    stop, timers, ended = Stop(), list[threading.Timer](), threading.Event()

    def kill() -> None:
        stop.killed = True
        (folder / launched_process.STOP).touch()
        for process in _started():
            process.kill()

    def watch() -> None:
        while not ended.wait(WATCH):
            if launched_process.USAGE in launched_process.read_codes(folder).values():
                if not ended.wait(limits.timeout):
                    kill()
                return

    def forward(number: int, frame: FrameType | None) -> None:
        if not (started := _started()):
            raise KeyboardInterrupt
        (folder / launched_process.STOP).touch()
        for process in started:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if not timers:
            timers.append(threading.Timer(limits.shutdown_timeout, kill))
            timers[0].daemon = True
            timers[0].start()

    before: dict[int, Any] = {}
    for name in STOP_SIGNALS:
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    threading.Thread(target=watch, daemon=True, name="unmask launch").start()
    try:
        yield stop
    finally:
        ended.set()
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _started() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def _conclude(
    codes: dict[int, int], failures: dict[int, ProcessFailure], processes: int, console: Console, stop: Stop
) -> int:
    """Return the common exit code, and report processes that a signal has ended."""
    if stop.killed:
        if set(codes.values()) == {launched_process.USAGE}:  # the others waited for one that has rejected its input
            return launched_process.USAGE
        console.warn("the processes did not stop in time and were killed; continue from the last checkpoint")
        return FAILED
    if failures:
        first = min(failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
            console.warn(f"process {first.pid} (local rank {first.local_rank}) was ended by {name}{memory}")
    found = {*codes.values(), *(failure.exitcode for failure in failures.values())}
    complete = len(codes) + len(failures) >= processes
    return found.pop() if len(found) == 1 and complete and min(found) >= 0 else FAILED


def _explained(error: Exception, layout: Layout, limits: Limits) -> Exception:
    """Return an error of torchrun about the address as a UserError, and other errors unchanged."""
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(f"got --address {layout.address}, but that port is in use on this host; choose another port")
    if type(error).__name__ in ("DistNetworkError", "DistStoreError", "RendezvousTimeoutError"):
        return UserError(
            f"not all hosts have joined at {layout.address} within {limits.join_timeout} s; expected `unmask launch "
            f"--nodes {layout.nodes}` with the same --address on each of them, and --node-rank 0 to {layout.nodes - 1}"
        )
    return error
