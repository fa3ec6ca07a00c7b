"""Send tensors from worker processes to the main process."""

from __future__ import annotations

import io
import mmap
import os
import pickle
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

AHEAD = 4  # maximum number of requests per worker that are not yet received
PAGE = mmap.PAGESIZE
ALIGNMENT = 64  # alignment of every tensor in a slot, in bytes


class Descriptor:
    """A file descriptor that is inherited by forked processes and sent to spawned ones."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate: Any) -> Descriptor:
    return Descriptor(duplicate.detach())


def memory_file() -> int | None:
    """Create an anonymous file in memory, or return None if the system does not support it."""
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
    """How a tensor is stored in a slot: offset in bytes, shape, strides and dtype."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


class _Packer(pickle.Pickler):
    """Pickle everything except tensors, which are collected in `tensors`; `size` is their total number of bytes."""

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


class Unpacker(pickle.Unpickler):
    """Unpickle the output of `_Packer`: tensors get their own memory, page-locked if `pin`, and their old strides."""

    def __init__(self, file: io.BytesIO, content: Any, pin: bool) -> None:
        super().__init__(file)
        self.content, self.pin = content, pin

    def persistent_load(self, pid: _Layout) -> Tensor:
        tensor = torch.empty_strided(pid.shape, pid.stride, dtype=pid.dtype, pin_memory=self.pin)
        _bytes_of(tensor)[:] = np.frombuffer(self.content, np.uint8, pid.nbytes, pid.offset)
        return tensor


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """Return the memory of a dense tensor as (bytes,) uint8, for any order of its dimensions."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


class Outbox:
    """The worker's end: sends results, and writes the current row to the first page of the shared memory file."""

    def __init__(self, pipe: Connection, file: Descriptor | None) -> None:
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
            self.slot_size = -(-packer.size // PAGE) * PAGE  # all batches except the last have the same size
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


def _lay(packer: _Packer, buffer: np.ndarray) -> None:
    for layout, content in packer.tensors:
        buffer[layout.offset : layout.offset + layout.nbytes] = content
