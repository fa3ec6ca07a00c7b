"""Check that a source has labels, and number the labels of test images like the training classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.data.annotations.class_names import class_name
from unmask.data.sources.source import Source
from unmask.errors import SourceError, UserError, listed


def require_labels(source: Source, known: Sequence[str] = ()) -> Source:
    """Return the source with its labels. If it has none, raise SourceError with the reason and how to add labels.

    known: training classes; if all images lie in one folder that is named like one of them, they get that label.
    """
    folders = (
        {name.partition("/")[0] if "/" in name else "" for name in source.names} if source.labels is None else set()
    )
    if len(folders) == 1 and folders <= set(known):
        source = source.with_labels(np.zeros(len(source), np.int64), sorted(folders))
    if source.labels is None:
        if source.unlabelled:
            raise SourceError(f"{source.name} has no class labels: {source.unlabelled}")
        if source.split_folders:
            raise SourceError(
                f"the folders of {source.name} ({', '.join(source.split_folders)}) are splits, not classes; use one "
                f"of them as DATA, for example {source.name.rstrip('/')}/{source.split_folders[-1]}"
            )
        why = ""
        if len(folders) > 1 and "" in folders:
            stray = [name for name in source.names if "/" not in name]
            why = f": {len(stray)} of its images lie beside the sub-folders ({listed(stray, 3)})"
        elif len(folders) == 1 and "" not in folders:
            why = f": all its images lie in one sub-folder, {folders.pop()}"
        raise SourceError(
            f"{source.name} has no class labels{why}; put the images of each class into a sub-folder with the name of "
            "the class (at least two classes)"
        )
    return source


def labels_of(source: Source) -> np.ndarray:
    """Return the labels (n,) of a source, which must have labels."""
    assert source.labels is not None, "call require_labels first"
    return source.labels


def absent_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """Return the classes without images, as text, or "" if every class has images."""
    there = set(np.unique(labels).tolist())
    return listed(name for number, name in enumerate(classes) if number not in there)


def renumber_labels(source: Source, classes: Sequence[str], data: str) -> Source:
    """Return a test source with its labels numbered like the training classes. Raises UserError for an unknown class.

    A test set may lack some of the training classes.
    """
    number = {class_name(name): i for i, name in enumerate(classes)}  # earlier versions stored names unnormalised
    if unknown := [name for name in source.classes if name not in number]:
        raise UserError(
            f"{source.name} has classes that {data} does not have ({', '.join(unknown[:6])}); expected "
            f"{', '.join(classes[:6])}{' ...' if len(classes) > 6 else ''}: put test images into sub-folders with the "
            "same names"
        )
    return source.with_labels(np.array([number[name] for name in source.classes], np.int64)[labels_of(source)], classes)
