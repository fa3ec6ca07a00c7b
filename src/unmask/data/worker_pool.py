"""Worker processes that make batches ahead of their use; the main process never waits for one without a limit.

Request number n goes to worker n modulo the number of workers, and results are returned in the order of the requests.
Two threads of the main process talk to the workers, one sends requests and one receives results, so that the thread
that trains waits on a queue only, where a signal, a dead worker or a stall is noticed at once.

Tensors travel through one anonymous file in memory per worker (Linux: memfd), divided into slots that are used again.
Such a file is not part of /dev/shm, which has 64 MB in a Docker container by default, and it is gone with the last
process that has it open. Where there is none (macOS, Windows, seccomp) tensors travel through the worker's pipe.

Not here: what a batch is and which images it has (`loader.py`).
"""

from __future__ import annotations

import atexit
import io
import mmap
import multiprocessing
import os
import pickle
import queue
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from unmask.errors import LoadingFailed
from unmask.system import processes
from unmask.system.stalls import TICK, VARIABLE, Patience, stall_seconds, write_stacks

AHEAD = 4  # requests of each worker that are being made, or wait to be used
READY = 2  # results on this side of the queue
GRACE = 3.0  # seconds for a killed process or a thread to end
PAGE = mmap.PAGESIZE
ALIGNMENT = 64  # of every tensor in a slot, in bytes

Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Maker(Protocol[Request, Result]):
    """What a worker runs. Picklable where processes are spawned."""

    def make(self, request: Request, note: Callable[[int], None]) -> Result:
        """One result; `note` is called with the row of the source that is read or decoded from now on."""
        ...

    def name(self, row: int) -> str:
        """The file of a row, for messages."""
        ...


# ------------------------------------------------------------------------------------------------------- the transport


class _Descriptor:
    """A file descriptor that a forked child inherits and a spawned one is given."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate: Any) -> _Descriptor:
    return _Descriptor(duplicate.detach())


def _memory_file() -> int | None:
    """A new anonymous file in memory; None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        number = os.memfd_create("unmask-batches", os.MFD_CLOEXEC)
        os.ftruncate(number, PAGE)
    except OSError:
        return None
    return number


@dataclass(frozen=True)
class _Layout:
    """Where a tensor lies: its bytes from `offset` on, and what makes a tensor of them again."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Elements in memory."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, which it collects; `size` is the room they need."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[_Layout, np.ndarray]] = []
        self.size = 0

    def persistent_id(self, obj: object) -> _Layout | None:
        if not isinstance(obj, Tensor):
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(obj.shape, obj.stride(), strict=True))
        if obj.numel() and extent != obj.numel():
            obj = obj.contiguous()
        layout = _Layout(self.size, tuple(obj.shape), obj.stride(), obj.dtype)
        self.tensors.append((layout, _bytes_of(obj)))
        self.size += -(-layout.nbytes // ALIGNMENT) * ALIGNMENT
        return layout


class _Unpacker(pickle.Unpickler):
    """Undoes `_Packer`: every tensor gets memory of its own, page-locked on request, and the strides it had."""

    def __init__(self, file: io.BytesIO, content: Any, pin: bool) -> None:
        super().__init__(file)
        self.content, self.pin = content, pin

    def persistent_load(self, pid: _Layout) -> Tensor:
        tensor = torch.empty_strided(pid.shape, pid.stride, dtype=pid.dtype, pin_memory=self.pin)
        _bytes_of(tensor)[:] = np.frombuffer(self.content, np.uint8, pid.nbytes, pid.offset)
        return tensor


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a dense tensor, (bytes,) uint8, whatever the order of its dimensions."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


class _Outbox:
    """A worker's side of the transport: results, and on the first page of the file the row that it works on."""

    def __init__(self, pipe: Connection, file: _Descriptor | None) -> None:
        self.pipe, self.file = pipe, file
        self.page = None if file is None else mmap.mmap(file.number, PAGE)
        self.slots: mmap.mmap | None = None
        self.slot_size, self.sent = 0, 0

    def note(self, row: int) -> None:
        if self.page is not None:
            self.page[:8] = (row + 1).to_bytes(8, "little")

    def send(self, result: object) -> None:
        header = io.BytesIO()
        packer = _Packer(header)
        packer.dump(result)
        if self.file is not None and self.slots is None and packer.size:
            self.slot_size = -(-packer.size // PAGE) * PAGE  # all batches of a loader but its last are of one size
            os.ftruncate(self.file.number, PAGE + AHEAD * self.slot_size)
            self.slots = mmap.mmap(self.file.number, AHEAD * self.slot_size, offset=PAGE)
        slot = self.sent % AHEAD
        self.sent += 1
        if self.slots is not None and packer.size <= self.slot_size:
            _lay(packer, np.frombuffer(self.slots, np.uint8, self.slot_size, slot * self.slot_size))
            self.pipe.send((slot, self.slot_size))
            self.pipe.send_bytes(header.getbuffer())
            return
        content = np.empty(packer.size, np.uint8)
        _lay(packer, content)
        self.pipe.send((None, packer.size))
        self.pipe.send_bytes(header.getbuffer())
        if packer.size:
            self.pipe.send_bytes(content.data)


def _lay(packer: _Packer, room: np.ndarray) -> None:
    for layout, content in packer.tensors:
        room[layout.offset : layout.offset + layout.nbytes] = content


# ----------------------------------------------------------------------------------------------------------- a worker


@dataclass(frozen=True)
class _Failure:
    """What a worker raised that it should not have."""

    sentence: str
    traceback: str


def _work(
    maker: Maker[Any, Any],
    caught: type[Exception],
    pipe: Connection,
    file: _Descriptor | None,
    stacks: _Descriptor | None,
) -> None:
    """The life of a worker: requests in, results out. Ends when the pipe does."""
    processes.begin_worker()
    if stacks is not None:
        processes.answer_with_stacks(stacks.number)
    torch.set_num_threads(1)
    outbox = _Outbox(pipe, file)
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = maker.make(request, outbox.note)
        except caught as error:
            result = error
        except MemoryError as error:
            result = _Failure(f"out of memory: {error}", traceback.format_exc())
        except Exception as error:
            result = _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            outbox.send(result)
        except (BrokenPipeError, ConnectionError):
            return


class _Worker:
    """The main process's side of one worker."""

    def __init__(
        self, maker: Maker[Any, Any], caught: type[Exception], number: int, stacks: _Descriptor | None
    ) -> None:
        self.number, self.received = number, 0
        descriptor = _memory_file()
        file = None if descriptor is None else _Descriptor(descriptor)
        try:
            self.pipe, theirs = multiprocessing.Pipe()
            self.process: BaseProcess = multiprocessing.get_context().Process(
                target=_work,
                args=(maker, caught, theirs, file, stacks),
                daemon=True,
                name=f"unmask loader {number + 1}",
            )
            self.process.start()
            theirs.close()
            self.page = None if descriptor is None else mmap.mmap(descriptor, PAGE, prot=mmap.PROT_READ)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        self.descriptor, self.slots = descriptor, None

    def receive(self, pin: bool) -> Any:
        """The next result. Raises EOFError or OSError when the worker has died."""
        self._wait()
        slot, size = self.pipe.recv()
        header = io.BytesIO(self.pipe.recv_bytes())
        if slot is None:
            content: Any = self.pipe.recv_bytes() if size else b""
        else:
            if self.slots is None:
                assert self.descriptor is not None
                self.slots = mmap.mmap(self.descriptor, AHEAD * size, prot=mmap.PROT_READ, offset=PAGE)
            content = memoryview(self.slots)[slot * size : (slot + 1) * size]
        return _Unpacker(header, content, pin).load()

    def _wait(self) -> None:
        """Until something is there to receive. A dead worker is noticed although others have its pipe open, by fork."""
        ready = connection.wait([self.pipe, self.process.sentinel])
        if self.pipe not in ready and not self.pipe.poll():
            raise EOFError

    @property
    def row(self) -> int | None:
        """The row of the source that it reads or decodes; None where that is not known."""
        if self.page is None:
            return None
        row = int.from_bytes(self.page[:8], "little")
        return row - 1 if row else None

    def end(self) -> None:
        self.process.kill()
        self.process.join(GRACE)
        if self.process.is_alive():  # in a system call that cannot be interrupted: multiprocessing must not wait for it
            multiprocessing.process._children.discard(self.process)  # type: ignore[attr-defined]
        self.pipe.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


# ------------------------------------------------------------------------------------------------------------ the pool


_END = object()
_open_pools: weakref.WeakSet[WorkerPool[Any, Any]] = weakref.WeakSet()


@dataclass(frozen=True)
class _Raised:
    """An exception of one of the threads, for the thread that waits."""

    error: BaseException


class WorkerPool(Iterator[Result], Generic[Request, Result]):
    """Results of `maker.make` for all requests, in their order, made by `workers` processes.

    caught: an exception of `make` that is raised here as it is. Others, a dead worker, and `stall_seconds` without a
    result raise LoadingFailed, which names the worker and what it was reading. pin: tensors in page-locked memory.
    folder: where the stacks of a stalled pool are written. Forgetting the object ends the workers, as `close` does.
    """

    def __init__(
        self,
        maker: Maker[Request, Result],
        requests: Iterable[Request],
        workers: int,
        *,
        caught: type[Exception],
        pin: bool = False,
        folder: Path | None = None,
    ) -> None:
        processes.require_main_guard()
        self.limit = stall_seconds()
        self.maker, self.folder = maker, folder
        self.parts = _Parts(requests, pin)
        self._finalizer = weakref.finalize(self, self.parts.end)
        try:
            self.parts.start(maker, caught, workers)
        except OSError as error:
            self.close()
            raise LoadingFailed(
                f"{workers} loader workers could not be started ({error.strerror}): raise the limit of open files with "
                "`ulimit -n 4096` and of processes with `ulimit -u`, or set data.workers=0"
            ) from error
        except BaseException:
            self.close()
            raise
        _open_pools.add(self)

    def close(self) -> None:
        """End the workers. Nothing more is delivered."""
        self._finalizer()

    def __next__(self) -> Result:
        patience = Patience(self.limit)
        while True:
            try:
                item = self.parts.ready.get(timeout=TICK)
                break
            except queue.Empty:
                if not self._finalizer.alive:
                    raise StopIteration from None
                if patience.tick():
                    raise self._stalled() from None
        if item is _END:
            self.parts.ready.put(_END)
            raise StopIteration
        if isinstance(item, _Raised):
            self.close()
            raise item.error
        if isinstance(item, _Failure):
            self.close()
            raise LoadingFailed(f"a loader worker failed: {item.sentence}\n{item.traceback}".rstrip())
        if isinstance(item, Exception):
            raise item
        return item

    def _stalled(self) -> LoadingFailed:
        worker = self.parts.awaited()
        state = processes.state_of(worker.process.pid or 0)
        file = write_stacks(self.folder, self.parts.stacks_of_workers())
        reading = "" if worker.row is None else f", reading {self.maker.name(worker.row)}"
        self.close()
        return LoadingFailed(
            f"no batch arrived for {self.limit:g} s: loader worker {worker.number + 1} of {len(self.parts.workers)} "
            f"(process {worker.process.pid}) was {state}{reading}; the stacks of all threads are in {file}. "
            f"{VARIABLE} sets another limit"
        )


class _Parts:
    """Processes, threads and queue of a pool, which do not hold the pool itself, so that it can be forgotten."""

    def __init__(self, requests: Iterable[Any], pin: bool) -> None:
        self.requests, self.pin = requests, pin
        self.workers: list[_Worker] = []
        self.ready: queue.Queue[Any] = queue.Queue(READY)
        self.room = threading.Semaphore(0)
        self.ending = threading.Event()
        self.owner = os.getpid()
        self.sent, self.received, self.complete = 0, 0, False
        self.progress = threading.Condition()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115, closed by `end`
        self.threads: list[threading.Thread] = []

    def start(self, maker: Maker[Any, Any], caught: type[Exception], workers: int) -> None:
        stacks = _Descriptor(self.stacks.fileno())
        for number in range(workers):
            self.workers.append(_Worker(maker, caught, number, stacks))
        self.room = threading.Semaphore(AHEAD * workers)
        for run in (self._send, self._receive):
            self.threads.append(threading.Thread(target=run, daemon=True, name=f"unmask {run.__name__[1:]} batches"))
            self.threads[-1].start()

    def _send(self) -> None:
        try:
            for request in self.requests:
                self.room.acquire()
                if self.ending.is_set():
                    return
                self.workers[self.sent % len(self.workers)].pipe.send(request)
                with self.progress:
                    self.sent += 1
                    self.progress.notify()
        except OSError:  # a dead worker, of which `_receive` reports as soon as it awaits this request
            with self.progress:
                self.sent += 1
                self.progress.notify()
            return
        except BaseException as error:
            self._hand_over(_Raised(error))
        with self.progress:
            self.complete = True
            self.progress.notify()

    def _receive(self) -> None:
        while not self.ending.is_set():
            with self.progress:
                self.progress.wait_for(lambda: self.received < self.sent or self.complete or self.ending.is_set())
                if self.received == self.sent:
                    break
            worker = self.awaited()
            try:
                item = worker.receive(self.pin)
            except (EOFError, OSError):
                item = _Raised(self._death(worker))
            except BaseException as error:
                item = _Raised(error)
            with self.progress:
                self.received += 1
            self.room.release()
            self._hand_over(item)
            if isinstance(item, _Raised):
                return
        self._hand_over(_END)

    def awaited(self) -> _Worker:
        """The worker whose result is the next one."""
        return self.workers[self.received % len(self.workers)]

    def _hand_over(self, item: object) -> None:
        while not self.ending.is_set():
            with suppress(queue.Full):
                self.ready.put(item, timeout=TICK)
                return

    def _death(self, worker: _Worker) -> LoadingFailed:
        worker.process.join(1)
        code = worker.process.exitcode
        how = f"ended with exit code {code}" if code is None or code >= 0 else f"was killed by signal {-code}"
        hint = "; out of memory? fewer workers (data.workers) need less" if code == -9 else ""
        return LoadingFailed(
            f"loader worker {worker.number + 1} of {len(self.workers)} (process {worker.process.pid}) {how}{hint}"
        )

    def stacks_of_workers(self) -> str:
        """What the workers answer within half a second; one that is stopped answers nothing."""
        parts = []
        for worker in self.workers:
            start = self.stacks.seek(0, os.SEEK_END)
            state = processes.state_of(worker.process.pid or 0)
            with suppress(OSError):
                if processes.STACKS_SIGNAL is not None and worker.process.pid is not None:
                    os.kill(worker.process.pid, processes.STACKS_SIGNAL)
            time.sleep(0.5 / len(self.workers))
            self.stacks.seek(start)
            answer = self.stacks.read().decode("utf-8", "replace") or "no answer\n"
            parts.append(f"loader worker {worker.number + 1}, process {worker.process.pid}, {state}:\n{answer}")
        return "\n".join(parts)

    def end(self) -> None:
        if os.getpid() != self.owner:  # a forked copy is forgotten: the workers are not its own
            return
        self.ending.set()
        for worker in self.workers:
            worker.process.kill()
        with self.progress:
            self.progress.notify()
        for _ in range(AHEAD * len(self.workers) + 1):
            self.room.release()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(GRACE)
        for worker in self.workers:
            worker.end()
        self.stacks.close()


@atexit.register
def _end_open_pools() -> None:
    """Before multiprocessing's own function, which sends its children SIGTERM and waits: workers ignore it."""
    for pool in list(_open_pools):
        pool.close()
