"""Keep freed memory in the process during training on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's parameter numbers for `mallopt`; the next line has their default values
USUAL = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}


@contextmanager
def memory_kept(device: str) -> Iterator[None]:
    """Context manager that keeps freed memory in the process on a CPU, and returns it to the system at the end.

    Every training step allocates and frees the same large tensors. By default glibc returns the memory of each tensor
    to the system at once, so the next allocation causes page faults (`benchmarks/step.py` counts them). It does nothing
    if the C library is not glibc, or if environment variables configure malloc. At the end, glibc's default limits are
    set again, but without its dynamic adjustment of the mmap threshold.
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
    # Otherwise each loader process that is forked from now on would keep the memory of the largest image that it has
    # decoded.
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
