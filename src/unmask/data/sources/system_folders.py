"""Recognise folders that an operating system, a NAS or a sync program creates among users' files.

Such folders contain thumbnails, deleted files or snapshots, which are copies of the images or unrelated, so they are
skipped. Names are compared case-insensitively. Names that a user may give to a class, such as "recycled", are not in
the list.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter

PATTERNS = (
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@transcode", "@gmt-*",  # Synology, QNAP, Samba.
    "#recycle", "#snapshot", "~snapshot", ".@__thumb", ".snapshot*",  # Recycle bins, snapshots and thumbnails of a NAS.
    "$recycle.bin", "system volume information", "found.[0-9][0-9][0-9]", "$windows.~*", "$extend",  # Windows.
    "lost+found", ".trash*", ".thumb*", ".zfs",  # Folders of Linux.
    "__macosx", "network trash folder", "temporary items",  # Folders of macOS and its file servers.
    ".ipynb_checkpoints", "__pycache__", "_gsdata_", ".stversions", ".picasaoriginals",  # Folders of other tools.
)  # fmt: skip
_SYSTEM = re.compile("|".join(fnmatch.translate(pattern) for pattern in PATTERNS))


def is_system(name: str) -> bool:
    """Return whether a folder with this name was created by a system or a tool."""
    return _SYSTEM.match(name.lower()) is not None


def is_hidden(name: str) -> bool:
    """Return whether a file or folder with this name is hidden by a leading dot or a system folder."""
    return name.startswith(".") or is_system(name)


def is_skipped(name: str, skipped: Counter[str]) -> bool:
    """Return whether a file or folder with this name is skipped; count system folders in `skipped`."""
    if is_system(name):
        skipped[f"system folder {name}"] += 1
    return is_hidden(name)
