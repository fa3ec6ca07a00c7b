"""Write files atomically: after a crash, a file has its old or its new content, never a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from unmask.errors import name_in_errors


def free_path(path: Path) -> Path:
    """Return `path` if nothing exists there, else the first of `path`-2, `path`-3, ... at which nothing exists."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """Context manager that opens a temporary file, and renames it to `path` on success or removes it on failure.

    The temporary file is in the same folder and is flushed to disk before it is renamed. The folder entry is flushed
    too.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with name_in_errors(path), partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, if the system supports it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
