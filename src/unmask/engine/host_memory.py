"""Keep freed memory in the process while a CPU trains."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's numbers for `mallopt`, and what it starts with
USUAL = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}


@contextmanager
def memory_kept(device: str) -> Iterator[None]:
    """Context manager in which, on a CPU, freed memory stays with the process; afterwards it returns to the system.

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
