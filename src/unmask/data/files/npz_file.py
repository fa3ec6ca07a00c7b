"""Write and read cache files of arrays with a SHA-256 checksum; a damaged or missing file reads as None.

The file is the digest followed by an .npz. Files are written under a temporary name and renamed, and never loaded into
memory as a whole.
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
    """Write arrays to a file; return its number of bytes. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(path) as file:
        file.write(bytes(DIGEST))
        np.savez(file, **arrays)  # type: ignore[arg-type]
        size, digest = file.tell(), _digest(file)
        file.seek(0)
        file.write(digest)
    return size


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays, or return None if the file is missing or damaged."""
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
    """Return the SHA-256 of everything after the digest."""
    file.seek(DIGEST)
    return hashlib.file_digest(file, "sha256").digest()
