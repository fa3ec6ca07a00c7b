"""Worker processes that make batches ahead of use; the main process waits for them with a time limit.

Request number n goes to worker n modulo the number of workers, and results are returned in the order of the requests.
In the main process, one thread sends requests and another receives results. The training thread only waits on a queue,
so it notices a signal, a dead worker or a stall at once.

Tensors are sent through one anonymous memory file per worker (Linux: memfd), divided into slots that are reused. Memory
files do not use /dev/shm, which is limited to 64 MB in Docker containers by default, and are deleted when the last
process closes them. On systems without memfd (macOS, Windows, seccomp), tensors are sent through the worker's pipe.

`loader.py` defines batches and their images.
"""

from __future__ import annotations

import atexit
import os
import queue
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from unmask.data.worker_process import GRACE, Failure, Maker, Request, Result, WorkerProcess
from unmask.data.worker_transport import AHEAD, Descriptor
from unmask.errors import LoadingFailed
from unmask.system import processes
from unmask.system.stalls import TICK, VARIABLE, Patience, stall_seconds, write_stacks

READY = 2  # maximum number of results buffered in the main process


_END = object()
_open_pools: weakref.WeakSet[WorkerPool[Any, Any]] = weakref.WeakSet()


@dataclass(frozen=True)
class _Raised:
    """An exception of one thread, passed on to the waiting thread."""

    error: BaseException


class WorkerPool(Iterator[Result], Generic[Request, Result]):
    """Iterate over the results of `maker.make` for all requests, in order, made by `workers` processes.

    caught: if `make` raises an exception of this type, it is raised here unchanged. Other exceptions, a dead worker,
    and no result for `stall_seconds` raise LoadingFailed, which names the worker and the file it was reading. pin:
    return page-locked tensors. folder: where stack traces of a stalled pool are written. Workers end on `close`, or
    when the object is garbage-collected.
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
                f"cannot start {workers} loader workers ({error.strerror}); raise the limit of open files with "
                "`ulimit -n 4096` and of processes with `ulimit -u`, or set data.workers=0"
            ) from error
        except BaseException:
            self.close()
            raise
        _open_pools.add(self)

    def close(self) -> None:
        """End the workers and the iterator."""
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
        if isinstance(item, Failure):
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
            f"(process {worker.process.pid}) was {state}{reading}; see the stack traces of all threads in {file}, or "
            f"set {VARIABLE} to another limit"
        )


class _Parts:
    """Processes, threads and queue of a pool, without a reference to the pool, so that it can be garbage-collected."""

    def __init__(self, requests: Iterable[Any], pin: bool) -> None:
        self.requests, self.pin = requests, pin
        self.workers: list[WorkerProcess] = []
        self.ready: queue.Queue[Any] = queue.Queue(READY)
        self.slots = threading.Semaphore(0)
        self.ending = threading.Event()
        self.owner = os.getpid()
        self.sent, self.received, self.complete = 0, 0, False
        self.progress = threading.Condition()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115, closed by `end`
        self.threads: list[threading.Thread] = []

    def start(self, maker: Maker[Any, Any], caught: type[Exception], workers: int) -> None:
        stacks = Descriptor(self.stacks.fileno())
        for number in range(workers):
            self.workers.append(WorkerProcess(maker, caught, number, stacks))
        self.slots = threading.Semaphore(AHEAD * workers)
        for run in (self._send, self._receive):
            self.threads.append(threading.Thread(target=run, daemon=True, name=f"unmask {run.__name__[1:]} batches"))
            self.threads[-1].start()

    def _send(self) -> None:
        try:
            for request in self.requests:
                self.slots.acquire()
                if self.ending.is_set():
                    return
                self.workers[self.sent % len(self.workers)].pipe.send(request)
                with self.progress:
                    self.sent += 1
                    self.progress.notify()
        except OSError:  # a dead worker; `_receive` reports the death when this request is due
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
            self.slots.release()
            self._hand_over(item)
            if isinstance(item, _Raised):
                return
        self._hand_over(_END)

    def awaited(self) -> WorkerProcess:
        """Return the worker that makes the next result."""
        return self.workers[self.received % len(self.workers)]

    def _hand_over(self, item: object) -> None:
        while not self.ending.is_set():
            with suppress(queue.Full):
                self.ready.put(item, timeout=TICK)
                return

    def _death(self, worker: WorkerProcess) -> LoadingFailed:
        worker.process.join(1)
        code = worker.process.exitcode
        how = f"ended with exit code {code}" if code is None or code >= 0 else f"was killed by signal {-code}"
        hint = "; if it ran out of memory, set fewer workers (data.workers)" if code == -9 else ""
        return LoadingFailed(
            f"loader worker {worker.number + 1} of {len(self.workers)} (process {worker.process.pid}) {how}{hint}"
        )

    def stacks_of_workers(self) -> str:
        """Return the stack traces that the workers write within half a second; a stopped worker writes none."""
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
        if os.getpid() != self.owner:  # a forked copy does not own the workers
            return
        self.ending.set()
        for worker in self.workers:
            worker.process.kill()
        with self.progress:
            self.progress.notify()
        for _ in range(AHEAD * len(self.workers) + 1):
            self.slots.release()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(GRACE)
        for worker in self.workers:
            worker.end()
        self.stacks.close()


@atexit.register
def _end_open_pools() -> None:
    """Close all pools before multiprocessing's exit handler, which would wait forever: workers ignore SIGTERM."""
    for pool in list(_open_pools):
        pool.close()
