"""Class labels from the names of folders.

Classes are the folder names on the first level that has more than one folder, if every image is in one of them.
Folders named train, val or test are splits, not classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.data.annotations.class_names import class_name

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def classes_of(names: Sequence[str]) -> tuple[list[str], np.ndarray | None, list[str]]:
    """Return (classes, labels (n,) or None, folders that are splits instead of classes) for '/'-separated names."""
    place: dict[str, int] = {}  # number of each class folder
    where = np.fromiter((place.setdefault(name.rpartition("/")[0], len(place)) for name in names), np.int64, len(names))
    folders = [folder.split("/") if folder else [] for folder in place]
    depth = min((len(parts) for parts in folders), default=0)
    for level in range(depth):
        here = sorted({parts[level] for parts in folders})
        if len(here) > 1:
            if {name.lower() for name in here} <= SPLITS:
                return [], None, here
            known = {name: class_name(name) for name in here}  # two Unicode spellings of a name are the same class
            classes = sorted(set(known.values()))
            if len(classes) < 2:
                continue
            number = {name: i for i, name in enumerate(classes)}
            return classes, np.array([number[known[parts[level]]] for parts in folders], np.int64)[where], []
    return [], None, []
