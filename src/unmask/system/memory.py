"""Free main memory of this machine, or of the container in which this process runs."""

from __future__ import annotations

from pathlib import Path

import psutil


def available_bytes() -> int:
    """Return how many bytes could be allocated now without swapping, within the limits of control groups."""
    machine, container = psutil.virtual_memory().available, container_bytes()
    return machine if container is None else min(machine, container)


def container_bytes(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the free bytes within the limits of this process's control group (version 2) and its parents, or None.

    None means that there is no limit. psutil does not read control groups. A group's inactive page cache counts as
    free, because it can be reclaimed.
    """
    path = next((path for key, path in _table(membership, "::") if key == "0"), "/").strip().lstrip("/")
    free = []
    for group in (groups / path, *(groups / path).parents):
        if not group.is_relative_to(groups):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            cache = next((int(size) for key, size in _table(group / "memory.stat", " ") if key == "inactive_file"), 0)
            free.append(max(0, int(limit) - used + cache))
    return min(free, default=None)


def _table(file: Path, separator: str) -> list[tuple[str, str]]:
    """Return (key, value) of each line of a small system file, or [] if the file does not exist."""
    try:
        parts = [line.partition(separator) for line in file.read_text().splitlines()]
    except OSError:
        return []
    return [(key, value) for key, _, value in parts]
