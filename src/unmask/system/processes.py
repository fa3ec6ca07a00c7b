"""Set up worker processes so that they end with their parent, and detect launchers that started several processes.

Other modules contain the code that runs in the workers: `data/worker_pool.py` for training batches, `data/scan/scan.py`
and `data/pack_images.py` for whole files. This module imports the standard library only.
"""

from __future__ import annotations

import ast
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from unmask.errors import UserError

STOP_SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
STACKS_SIGNAL = getattr(signal, "SIGUSR2", None)  # on this signal a worker writes the stacks of its threads
_PR_SET_PDEATHSIG = 1


# In a worker process


def begin_worker() -> None:
    """Set up a worker process: it ignores the signals that stop a run, and ends when its parent ends."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # a forked child inherits the signal socket of its parent
    end_with_parent()


def end_with_parent() -> None:
    """Make this worker end when its parent process dies for any reason.

    On Linux the kernel kills it, even if it is stopped or busy in C code. On all systems a thread watches the pipe that
    multiprocessing keeps open between parent and child.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        _ask_kernel_to_end_with_parent()
        if multiprocessing.get_start_method() == "fork" and os.getppid() != parent.pid:
            os._exit(1)  # the parent died before prctl was called
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True, name="parent watch").start()


def end_with(parent: int) -> None:
    """Make this process end when its parent, the process with this id, dies for any reason. Linux only."""
    if sys.platform == "linux":
        _ask_kernel_to_end_with_parent()
        if os.getppid() != parent:
            os._exit(1)  # the parent died before prctl was called


def _ask_kernel_to_end_with_parent() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def answer_with_stacks(file: int) -> None:
    """Write the stacks of all threads to a file descriptor whenever `STACKS_SIGNAL` arrives."""
    if STACKS_SIGNAL is not None and hasattr(faulthandler, "register"):
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


# In the main process


@contextmanager
def process_pool(
    workers: int, initializer: Callable[..., object], arguments: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """Context manager for a pool of processes, which are killed if an error or Ctrl-C ends the body.

    Without this, the executor would wait until its processes have finished their current work, which may never happen.
    """
    require_main_guard()
    pool = ProcessPoolExecutor(workers, initializer=_begin_pooled, initargs=(initializer, arguments))
    try:
        yield pool
    except BaseException:
        started = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.kill()
        raise
    pool.shutdown(wait=False, cancel_futures=True)


def _begin_pooled(initializer: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    begin_worker()
    initializer(*arguments)


def state_of(process: int) -> str:
    """Return the state of a process in words, for messages, such as 'stopped by a debugger'."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "in an unknown state"
    states = {
        "T": f"stopped by a signal (`kill -CONT {process}` continues it)",
        "t": "stopped by a debugger",
        "D": "waiting for a disk or network file system that does not answer",
        "R": "computing",
        "S": "waiting",
        "Z": "dead",
        "X": "dead",
    }
    return states.get(fields[0], f"in state {fields[0]}")


def require_main_guard() -> None:
    """Reject a script that every worker process would run again. Raises UserError.

    With the start methods spawn and forkserver (the default on macOS, on Windows, and on Linux from Python 3.14), a new
    process first imports the main script.
    """
    advice = 'put the call under `if __name__ == "__main__":`'
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that is importing the main script
        raise UserError(f"unmask was called while a worker process imported the main script: {advice}")
    if multiprocessing.get_start_method() == "fork":
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            file = frame.f_globals.get("__file__")
            if file is not None and not _guarded(Path(file), frame.f_lineno):
                raise UserError(
                    f"{file}, line {frame.f_lineno}, calls unmask outside a main guard, and every worker process "
                    f"would run the script again: {advice}"
                )
        frame = frame.f_back


def _guarded(script: Path, line: int) -> bool:
    """Return whether this line is inside an `if` that tests `__name__`, or True if the script cannot be read."""
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, ValueError, SyntaxError):
        return True
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.end_lineno or line)
        and "__name__" in ast.dump(node.test)
        for node in ast.walk(tree)
    )


# Launchers


_OTHER_LAUNCHERS = {"srun": "SLURM_NTASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


def launched(environment: Mapping[str, str] | None = None) -> int:
    """Return how many processes torchrun, or a launcher that sets the same variables, has started; 1 without one."""
    environment = os.environ if environment is None else environment
    size = environment.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and int(size) > 1 and "RANK" in environment else 1


def speaks() -> bool:
    """Return whether this process prints the results of a command, which other processes execute too."""
    return launched() == 1 or os.environ.get("RANK") == "0"


def own_file(name: str) -> str:
    """Return the name of a file that each process of a launcher writes: `name`, or NAME-rank-N.ENDING if it does not
    speak.
    """
    stem, dot, ending = name.partition(".")
    return name if speaks() else f"{stem}-rank-{os.environ.get('RANK')}{dot}{ending}"


def speaks_for_host() -> bool:
    """Return whether this process prints errors that occur before the processes are connected: one per host."""
    return speaks() or os.environ.get("LOCAL_RANK") == "0"


def _prefix_of_first() -> str | None:
    return "" if speaks() else None


error_prefix: Callable[[], str | None] = _prefix_of_first
"""Return the text before the message about an error of this process, or None if another process prints it.

Processes that work together replace this function.
"""


def reject_launchers(verb: str, *, together: bool, environment: Mapping[str, str] | None = None) -> None:
    """Reject launchers of several processes that the verb cannot use. Raises UserError.

    together: whether several processes execute the verb together.
    """
    environment = os.environ if environment is None else environment
    if together:
        reject_other_launchers(environment)
    elif (count := launched(environment)) > 1:
        raise UserError(
            f"got WORLD_SIZE={count}, set by a launcher; expected one process, because `unmask {verb}` does not divide "
            "its work among processes; start it without the launcher"
        )


def reject_other_launchers(environment: Mapping[str, str] | None = None) -> None:
    """Reject launchers that start several processes, but do not connect them as torchrun does. Raises UserError."""
    environment = os.environ if environment is None else environment
    if launched(environment) > 1:
        return
    for launcher, size in _OTHER_LAUNCHERS.items():
        count = environment.get(size, "")
        if not count.isdecimal() or int(count) <= 1 or (launcher == "srun" and not _under_srun(environment)):
            continue
        raise UserError(
            f"got {size}={count} (set by {launcher}); expected processes that torchrun started, because those of "
            f"{launcher} are not connected, and each would train by itself; use one task per host, and start the "
            "command in it with `unmask launch`; docs/scale-out.md has examples"
        )


def _under_srun(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of several tasks.

    The variables SLURM_NTASKS and SLURM_PROCID are not enough, because they are also set in the script of an sbatch
    job, which runs once.
    """
    step = environment.get("SLURM_STEP_ID")
    batch_script = step == "4294967291" or (step is None and environment.get("ENVIRONMENT") == "BATCH")
    return "SLURM_PROCID" in environment and not batch_script and environment.get("SLURM_STEP_NUM_TASKS", "many") != "1"
