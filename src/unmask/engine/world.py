"""All that is known of processes: which one this is, how many train together, and how they agree.

A launcher such as torchrun starts several processes with the same command, and each of them runs this package. One of
them, the writer (rank 0), prints messages and writes the run; the others compute their parts of each batch.

Nothing may be decided by one process alone, because the others would wait for it forever. What is agreed, and where
(files without a folder are in `engine/`):

    before the training
        the versions; files of the same names and sizes     `world.py`; `divided_scan.py`
        the images and their scan                           `divided_scan.py`
        whether a command begins a run or continues one     `continue_or_start.py`
        the settings, the plan, the name of a new run       `start_run.py`, `training_data.py`
        the run folder and its lock                         `shared_run.py`
        the plan of a run that continues                    `continue_run.py`
        changes of the images, masks or test images         `dataset_record.py`
        weights of step 0, the checkpoint to continue from  `training_state.py`, `checkpoint.py`, `sharding.py`
    during the training
        stop requests, saving and logging by the clock      `train.py`, `Loop.what_is_due`
        unreadable files, absent pixels                     `stream.py`, for each micro-batch
        counts and statistics of a whole micro-batch        `sharding.py` for `nn/batch_sums.py`, on the device
        loss, gradient, non-finite steps, rollbacks         `train.py`, `step` and `read`, on the device
        pictures, evaluations, and stops during them        `samples.py`, `evaluation.py`, by `unless_stopped`
        the number of steps and the time of a budget        `pacing.py`
        whether a checkpoint is complete                    `checkpoint.py`, in the thread of `checkpoint_writer.py`
        the result of a supervised run                      `run_training.py`
    in other commands
        the checkpoint to load                              `load.py`
        the batches that each process computes              `divided_batches.py`, `evals/images.py`
        the images and labels of a probe                    `evals/run_probe.py`
        the images that have features, the best layer       `evals/frozen_features.py`, `evals/feature_sets.py`
        results                                             `check_data.py`, `evals/embed_images.py`,
                                                            `evals/run_probe.py`, `finetuning/predict_images.py`,
                                                            `finetuning/paper_linear_probe.py`
    at any time
        that a process is alive, and why it ended           `pulse.py`

A single process is `ALONE`, and none of this takes any time.
"""

from __future__ import annotations

import atexit
import os
import pickle
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.console import Console
from unmask.engine import pulse
from unmask.engine.pulse import Pulse
from unmask.engine.versions import provenance_versions
from unmask.errors import UserError
from unmask.system import processes, stop_requests
from unmask.system.launched_process import exit_at_once
from unmask.system.processes import reject_other_launchers
from unmask.system.stop_requests import INTERRUPTED, StopRequest

P = ParamSpec("P")
T = TypeVar("T")

COLLECTIVE = timedelta(minutes=30)  # limit of an operation on the device: as long as compiling the first step may take
ASK = 0.05  # seconds between two questions whether a stop is requested, while the others wait for the writer
FOREVER = timedelta(days=30)  # limit of a wait on the host; `Pulse` detects processes that have ended


class WorldError(UserError):
    """Raised if the processes that a launcher started cannot train together."""


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    rank: number of this process, 0 to size - 1. local_rank, local_size: the same among the processes of this machine.
    group: process group for values on the host (None: one process). devices: process group for tensors on the device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = field(default=None, repr=False)
    devices: Any = field(default=None, repr=False)

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is True in any process."""
        if self.alone:
            return flags
        shared = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in shared.tolist())

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks. value: picklable."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def to_writer(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks, in the writer, and [] elsewhere."""
        if self.alone:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_writer else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def from_writer(self, make: Callable[[], T]) -> T:
        """Return the result of `make`, which only the writer calls, in all processes; or raise its error in all.

        The result must be picklable. The other processes wait for as long as the writer takes. `make` works as in a
        single process: within it, `current` returns `ALONE`.
        """
        if self.alone:
            return make()
        message: list[Any] = [None]
        mine: BaseException | None = None
        if self.is_writer:
            try:
                with alone():
                    message = [(make(), None)]
            except BaseException as error:
                message, mine = [(None, _sendable(error))], error
        dist.broadcast_object_list(message, src=0, group=self.group)
        result, error = message[0]
        if error is not None:
            raise mine or error
        return result

    def on_writer(self, make: Callable[[], T]) -> T | None:
        """Return the result of `make` in the writer, which alone calls it, and None elsewhere; raise its error in all.

        Unlike that of `from_writer`, the result is not sent to the others.
        """
        made: list[T] = []
        self.from_writer(lambda: made.append(make()))
        return made[0] if made else None

    def unless_stopped(self, stop: StopRequest, make: Callable[[], T]) -> T:
        """Return the result of `make` like `from_writer`, or raise StopRequested in all if any process is to stop.

        A stop request in any process interrupts `make` in the writer, inside `stop.interruptible()`. If it arrives
        later, `make` is completed.
        """
        if self.alone:
            return make()
        if not self.is_writer:
            while not self.any(stop.requested, False)[1]:
                time.sleep(ASK)
            return self.from_writer(make)

        def interruptible() -> T:
            with self._others_asked(stop), stop.deciding():
                return make()

        return self.from_writer(interruptible)

    @contextmanager
    def _others_asked(self, stop: StopRequest) -> Iterator[None]:
        """Context manager in which a thread of the writer passes stop requests of other processes on to `stop`."""
        ended = threading.Event()

        def ask() -> None:
            with suppress(RuntimeError):  # the main thread will find that a connection is lost
                last = False
                while not last:
                    last = ended.wait(ASK)
                    if self.any(False, last)[0] and not stop.requested:
                        stop.request_by_thread()

        thread = threading.Thread(target=ask, name="unmask stop requests", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes, computed on its device. tensor: of the same shape in all."""
        return tensor if self.alone else self.sum(tensor) / self.size

    def means(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        """Return the means of 0-d tensors over all processes, in one operation."""
        return scalars if self.alone else tuple(self.mean(torch.stack(scalars)))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, computed on its device. tensor: of the same shape in all."""
        if self.alone:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.devices)
        return total

    def channel(self) -> World:
        """Return the same processes with a process group of their own, for use by another thread."""
        if self.alone:
            return self
        group = dist.new_group(backend="gloo", timeout=FOREVER)
        return replace(self, group=group, devices=group)

    def require_same(self, what: str, value: str, advice: str) -> None:
        """Raise WorldError in all processes unless `value` is the same in all. what, advice: for the message."""
        if self.alone:
            return
        found = self.gather((value, socket.gethostname()))
        for rank, (other, host) in enumerate(found):
            if other != found[0][0]:
                raise WorldError(
                    f"{what} differ between processes: got {found[0][0]} in rank 0 on {found[0][1]}, and {other} in "
                    f"rank {rank} on {host}; expected the same in all; {advice}"
                )

    def console(self, console: Console | None) -> Console:
        """Return the console of this process, which prints nothing unless it is the writer's."""
        return console or Console() if self.is_writer else Console(silent=True)


ALONE = World()

_joined: World = ALONE
_apart: ContextVar[bool] = ContextVar("apart", default=False)  # each thread has its own value
_pulse: Pulse | None = None


def current() -> World:
    """Return the processes that train together, `ALONE` outside `joined` and within `alone`."""
    return ALONE if _apart.get() else _joined


@contextmanager
def joined() -> Iterator[World]:
    """Context manager in which this process works together with the others that the launcher started, if any.

    An error in one process ends all of them, and one of them prints it. The connection stays open until the process
    ends. Raises WorldError if not all processes arrive, or if their versions differ.
    """
    global _joined
    if _joined is not ALONE or processes.launched() == 1:
        reject_other_launchers()
        yield current()
        return
    stop_requests.on_blocked = _end_blocked
    try:
        _joined = _connect()
    except BaseException:
        stop_requests.on_blocked = None
        raise
    try:
        _joined.require_same("versions", _versions(), "install the same versions on all hosts")
        yield _joined
    except BaseException as error:
        assert _pulse is not None
        _pulse.fail(error)
        raise
    finally:
        _joined = ALONE
        stop_requests.on_blocked = None


@contextmanager
def alone() -> Iterator[None]:
    """Context manager in which this thread works as if in a single process, while the other processes wait for it.

    Other threads are not affected: a checkpoint may be written meanwhile, by all processes together.
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator for a function with a keyword `console`, which all processes that a launcher started call together.

    Only the writer's console prints.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with joined() as world:
            console = kwargs.get("console")
            assert console is None or isinstance(console, Console), "the type of the parameter"
            return function(*args, **{**kwargs, "console": world.console(console)})  # type: ignore[arg-type]

    return call


def blame_other_process(error: RuntimeError) -> None:
    """End this process, with the message about another one, if its end is the cause of the error."""
    if _pulse is not None and _joined is not ALONE:
        _pulse.blame(error)


def on_failure(record: Callable[[str | None], object]) -> None:
    """Call `record` before this process ends because another one has failed, with a message, or has been interrupted,
    with None.
    """
    if _pulse is not None:
        _pulse.on_failure = record


def _end_blocked() -> None:
    """End this process after a signal, although its main thread waits for other processes in a C library."""
    if _pulse is not None:
        _pulse.interrupt()
    exit_at_once(INTERRUPTED)


def _connect() -> World:
    global _pulse
    reject_other_launchers()
    rank, size, local_rank, local_size = _numbers(os.environ)
    seconds = pulse.limit_seconds()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    here = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    processes.error_prefix = lambda: "" if processes.speaks_for_host() else None
    try:
        if not dist.is_initialized():
            if rank > 0 and not pulse.launcher_holds_store():
                _require_store(seconds)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE, **_store_of_attempt(rank, size))
            atexit.register(_disconnect)
        group = dist.new_group(backend="gloo", timeout=FOREVER)
    except WorldError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise WorldError(
                f"got MASTER_PORT={os.environ['MASTER_PORT']}; expected a free port, but another program on "
                f"{socket.gethostname()} uses it; set MASTER_PORT to another port, the same for all processes"
            ) from None
        raise WorldError(
            f"rank {rank} of {size} could not connect to the other processes at {here}: "
            f"{str(error).splitlines()[0]}; start all {size} processes at about the same time, with an address and a "
            "free port that all hosts can reach"
        ) from None
    world = World(rank, size, local_rank, local_size, group, dist.group.WORLD)
    if _pulse is None:
        key = world.from_writer(lambda: uuid.uuid4().hex)
        _pulse = Pulse(rank, size, key, seconds)
        _pulse.start()
        processes.error_prefix = _pulse.error_prefix
    return world


def _require_store(seconds: float) -> None:
    """Wait until rank 0 answers at its address. Raises WorldError if another program has accepted connections there for
    `seconds`.

    Torch would wait without limit for the answer of such a program, so another thread waits for it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    errors: list[Exception] = []

    def connect() -> None:
        try:
            dist.TCPStore(host, port, is_master=False, timeout=COLLECTIVE)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="unmask connect")
    thread.start()
    since = None
    while thread.join(1.0) or thread.is_alive():
        since = (since or time.monotonic()) if _is_open(host, port) else None
        if since is not None and time.monotonic() - since > seconds:
            raise WorldError(
                f"got MASTER_ADDR={host} and MASTER_PORT={port}; expected rank 0 there, but another program uses that "
                "port; set MASTER_PORT to another port, the same for all processes"
            )
    if errors:
        raise errors[0]


def _is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _store_of_attempt(rank: int, size: int) -> dict[str, Any]:
    """Return arguments for torch: a part of torchrun's store that no earlier attempt of the processes has used.

    torchrun keeps its store when it restarts the processes (torch 2.11 to 2.13), so that they would find the addresses
    of those that have ended, and could not connect.
    """
    if not pulse.launcher_holds_store():
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=COLLECTIVE)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"unmask/attempt-{attempt}", store), "rank": rank, "world_size": size}


def _disconnect() -> None:
    if _pulse is not None:
        if _pulse.failed:
            _pulse.end_in_order()
            return  # the other processes may be gone, and closing the connections could wait for them
        _pulse.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _versions() -> str:
    versions = provenance_versions()
    return f"unmask {versions['unmask']}, torch {versions['torch']}, Python {platform.python_version()}"


def _numbers(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Return rank, size, local rank and local size from the variables that torchrun sets. Raises WorldError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [environment.get(name, "") for name in names]
    if not texts[3].isdecimal():
        texts[3] = texts[1]
    if not texts[2].isdecimal():
        texts[2] = texts[0]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing or not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        got = ", ".join(f"{name}={environment.get(name, '')}" for name in (*names, "MASTER_ADDR", "MASTER_PORT"))
        raise WorldError(
            f"got {got}; expected the variables that torchrun sets; start the command with `unmask launch`, or with "
            "torchrun"
        )
    rank, size, local_rank, local_size = (int(text) for text in texts)
    return rank, size, local_rank, local_size


def _sendable(error: BaseException) -> BaseException:
    """Return the error if it can be sent to another process, else a UserError or RuntimeError with the same text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # constructors of errors may need other arguments
        return (UserError if isinstance(error, UserError) else RuntimeError)(str(error))
