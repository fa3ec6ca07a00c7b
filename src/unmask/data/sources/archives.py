"""Functions shared by tar, zip and parquet sources: which members are images, and when they changed."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from unmask.data import limits
from unmask.data.sources.image_files import EXTENSIONS
from unmask.data.sources.source import last_change, stat_or_none
from unmask.data.sources.system_folders import is_skipped


def has_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def is_wanted(name: str, size: int, skipped: Counter[str]) -> bool:
    """Return whether an archive member is an image to read; otherwise count it in `skipped`."""
    parts = name.split("/")
    if ".." in parts:
        skipped["path that leaves the archive"] += 1
        return False
    # tar may store a.jpg as ./a.jpg
    if any(is_skipped(part, skipped) for part in parts if part != "."):
        return False
    if not name.lower().endswith(EXTENSIONS):
        skipped[os.path.splitext(name)[1].lower()] += 1
        return False
    if size > limits.MAX_FILE_BYTES:
        skipped["member too large"] += 1
        return False
    return True


def times_of_archive(path: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `Source.changed` and `Source.modified` for all members, which are the times of their archive."""
    found = stat_or_none(path)
    times = (-1, -1) if found is None else (last_change(found), found.st_mtime_ns)
    return np.full(rows, times[0], np.int64), np.full(rows, times[1], np.int64)
