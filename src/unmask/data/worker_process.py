"""A worker process: the loop that it runs, and the main process's handle to it."""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing import process as process_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch

from unmask.data.worker_transport import AHEAD, PAGE, Descriptor, Outbox, Unpacker, memory_file
from unmask.system import processes

GRACE = 3.0  # seconds for a killed process or a thread to end

Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Maker(Protocol[Request, Result]):
    """Object that makes results in worker processes; must be picklable on systems that spawn processes."""

    def make(self, request: Request, note: Callable[[int], None]) -> Result:
        """Return one result; call `note` with each row of the source before it is read or decoded."""
        ...

    def name(self, row: int) -> str:
        """Return the name of a row's file, for messages."""
        ...


@dataclass(frozen=True)
class Failure:
    """An unexpected exception in a worker."""

    sentence: str
    traceback: str


def _work(
    maker: Maker[Any, Any],
    caught: type[Exception],
    pipe: Connection,
    file: Descriptor | None,
    stacks: Descriptor | None,
) -> None:
    """Serve requests until the pipe is closed."""
    processes.begin_worker()
    if stacks is not None:
        processes.answer_with_stacks(stacks.number)
    torch.set_num_threads(1)
    outbox = Outbox(pipe, file)
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
            result = Failure(f"out of memory: {error}", traceback.format_exc())
        except Exception as error:
            result = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            outbox.send(result)
        except (BrokenPipeError, ConnectionError):
            return


class WorkerProcess:
    """The main process's handle to one worker."""

    def __init__(self, maker: Maker[Any, Any], caught: type[Exception], number: int, stacks: Descriptor | None) -> None:
        self.number, self.received = number, 0
        descriptor = memory_file()
        file = None if descriptor is None else Descriptor(descriptor)
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
        """Return the next result. Raises EOFError or OSError if the worker has died."""
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
        return Unpacker(header, content, pin).load()

    def _wait(self) -> None:
        """Wait for data. Raises EOFError if the worker is dead, even if other forked workers keep its pipe open."""
        ready = connection.wait([self.pipe, self.process.sentinel])
        if self.pipe not in ready and not self.pipe.poll():
            raise EOFError

    @property
    def row(self) -> int | None:
        """The row of the source that the worker is reading or decoding, or None if unknown."""
        if self.page is None:
            return None
        row = int.from_bytes(self.page[:8], "little")
        return row - 1 if row else None

    def end(self) -> None:
        self.process.kill()
        self.process.join(GRACE)
        if self.process.is_alive():  # the process is blocked in the kernel; do not wait for it
            _forget(self.process)
        self.pipe.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _forget(process: BaseProcess) -> None:
    """Remove a process from multiprocessing's private list of children, so that exit does not wait for it."""
    getattr(process_module, "_children", set()).discard(process)
