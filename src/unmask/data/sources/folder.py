"""A folder tree of images, or of parquet or tar shards if it contains no images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

from unmask.data.sources.image_files import EXTENSIONS, Listing
from unmask.data.sources.shards import SHARD_ENDINGS, SHARDS, open_shards_below
from unmask.data.sources.source import Opener, Source
from unmask.data.sources.system_folders import is_hidden, is_skipped, is_system


def open_folder(text: str) -> Source:
    """List the images below a folder, and label them by folder as described in `class_folders.py`."""
    skipped: Counter[str] = Counter()
    listing = Listing()
    walk(text, listing, skipped)
    if not listing.paths and any(skipped[ending] for ending in SHARD_ENDINGS) and (shards := _shards_below(text)):
        return open_shards_below(text, os.path.abspath(text), shards, location=os.path.abspath(text))
    source = listing.files(text, os.path.abspath(text), ordered=False)
    source.skipped = skipped
    source.label_by_folder()
    return source


def _shards_below(root: str) -> list[str]:
    """Return the paths of parquet and tar files below a folder. Hidden and system folders are skipped."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not is_hidden(name) and not is_system(name))
        found += [os.path.join(folder, name) for name in files if name.lower().endswith(SHARDS) and not is_hidden(name)]
    return found


def walk(root: str, listing: Listing, skipped: Counter[str], wanted: Callable[[str], bool] | None = None) -> None:
    """Add every image file below `root` to `listing` if `wanted` accepts its relative path.

    Each folder is listed once, under its shallowest path, so cyclic links are safe. Run folders are skipped. Files are
    not opened.
    """
    seen: set[tuple[int, int]] = set()
    level = [""]
    while level:
        level = [
            path
            for folder in level
            for path in _list_folder(root, folder, seen=seen, listing=listing, skipped=skipped, wanted=wanted)
        ]


def _list_folder(
    root: str,
    folder: str,
    seen: set[tuple[int, int]],
    listing: Listing,
    skipped: Counter[str],
    wanted: Callable[[str], bool] | None,
) -> list[str]:
    """Add the images of one folder; return its sub-folders, links last."""
    try:
        here = os.stat(os.path.join(root, folder))
        if (here.st_dev, here.st_ino) in seen:
            skipped["folder seen before"] += 1
            return []
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            found = [entry for entry in entries if not is_skipped(entry.name, skipped)]
        if {"config.json", "plan.json"} <= {entry.name for entry in found}:
            skipped["run folder"] += 1  # pictures in a run folder are not data, and change during training
            return []
    except PermissionError:
        skipped["folder without permission"] += 1
        return []
    except OSError:
        skipped["folder that cannot be read"] += 1
        return []
    below: list[os.DirEntry[str]] = []
    for entry in found:
        path = f"{folder}{os.sep}{entry.name}" if folder else entry.name
        try:
            if entry.is_dir():
                below.append(entry)
            elif wanted is not None and not wanted(path.replace(os.sep, "/")):
                continue
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped[os.path.splitext(entry.name)[1].lower()] += 1
            elif entry.is_file():
                listing.add(path, entry.stat())
            elif entry.is_symlink() and not os.path.exists(entry.path):
                skipped["broken link"] += 1
            else:
                skipped["not a regular file"] += 1
        except OSError:
            skipped["broken link"] += 1
    below.sort(key=lambda entry: (entry.is_symlink(), os.fsencode(entry.name)))
    return [os.path.join(folder, entry.name) for entry in below]


OPENER = Opener("a folder", os.path.isdir, open_folder)
