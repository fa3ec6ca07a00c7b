"""Arrays kept in one file that is whole or not there at all: for what can be computed again, only more slowly.

Thirty-two bytes of SHA-256, then a .npz of what they are the digest of. Written beside its name and renamed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unmask.run import replace_file


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the bytes of the file. Raises OSError where it cannot be written."""
    content = io.BytesIO()
    content.write(bytes(32))
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with content.getbuffer() as view:
        view[:32] = hashlib.sha256(view[32:]).digest()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, bytes(view))
        return len(view)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays; None where there is no such file, or it is not as it was written."""
    try:
        content = path.read_bytes()
    except (OSError, MemoryError):
        return None
    if hashlib.sha256(memoryview(content)[32:]).digest() != content[:32]:
        return None
    with np.load(io.BytesIO(content[32:]), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
