"""How a method runs on the machine, from outside: compiled blocks, and memory that stays. It computes the same numbers.

A method is a plain module and never learns of it; `train.py` asks for it in one line each. Not here: precision and
micro-batches (`plan.py`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from unmask.nn.blocks import Block
from unmask.nn.cross import CrossBlock

BLOCKS = (Block, CrossBlock)

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's numbers for `mallopt`, and what it starts with
USUAL = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}


def compile_blocks(method: nn.Module, backend: str = "inductor") -> int:
    """Compile the transformer blocks of a method, in place; returns how many there are.

    Each on its own, so that blocks alike in shape and settings share one compilation: it costs as much for 32 blocks as
    for two, and what depends on the draws (masks, which patches) stays outside, so nothing is compiled again from step
    to step. backend: one of torch's.
    """
    blocks = [part for part in method.modules() if isinstance(part, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)


def why_not_compiled(device: str) -> str | None:
    """None where torch.compile works, or the reason in one line. It is tried, which takes a second or more."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, a missing header, a version that does not fit: whatever it finds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def uncompiled() -> AbstractContextManager[object]:
    """Within, compiled blocks run as written: for passes of another size, which would be compiled for themselves."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and to import it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def memory_kept(device: str) -> Iterator[None]:
    """Within, on a CPU, memory that is freed stays with the process; afterwards it goes back to the system.

    A step frees and asks for the same large tensors again and again. glibc gives each back at once, so the next one is
    paid for in page faults (`benchmarks/step.py` counts them). Other C libraries, and a user who has set malloc by the
    environment, are left alone. Afterwards the usual limits hold, but no longer the one that glibc moves by itself.
    """
    libc = None if device != "cpu" or _malloc_is_set() else _glibc()
    if libc is None:
        yield
        return

    def usual() -> None:
        for number, value in USUAL.items():
            libc.mallopt(number, value)
        libc.malloc_trim(0)

    inside = True
    # Loader processes forked meanwhile would each keep as much as the largest image that they ever decode.
    os.register_at_fork(after_in_child=lambda: usual() if inside else None)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
    libc.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        inside = False
        usual()


def _malloc_is_set() -> bool:
    named = any(name.startswith("MALLOC_") for name in os.environ)
    return named or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
