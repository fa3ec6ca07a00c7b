"""Arrays kept in one file that is whole or not there at all: for what can be computed again, only more slowly.

A SHA-256, then the .npz it is of; beside its name first, then renamed. It is never held in memory as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import BufferedRandom, BufferedReader
from pathlib import Path

import numpy as np

from unmask.system.atomic_files import replacing

DIGEST = 32  # bytes


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the bytes of the file. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(path) as file:
        file.write(bytes(DIGEST))
        np.savez(file, **arrays)  # type: ignore[arg-type]
        size, digest = file.tell(), _digest(file)
        file.seek(0)
        file.write(digest)
    return size


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays; None where there is no such file, or it is not as it was written."""
    try:
        with path.open("rb") as file:
            if file.read(DIGEST) != _digest(file):
                return None
            file.seek(DIGEST)
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
    except (OSError, MemoryError):
        return None


def _digest(file: BufferedReader | BufferedRandom) -> bytes:
    """Of all that lies behind the place for it."""
    file.seek(DIGEST)
    return hashlib.file_digest(file, "sha256").digest()
