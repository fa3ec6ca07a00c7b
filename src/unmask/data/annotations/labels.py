"""Labels of a source: require them, and number those of test images like the training classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.data.annotations.class_names import class_name
from unmask.data.sources.source import Source
from unmask.errors import SourceError, UserError, some


def require_labels(source: Source, known: Sequence[str] = ()) -> Source:
    """Return the source if it has labels. Raises SourceError with the reason why not and how to add labels.

    known: classes of the training images; a source whose images are all of one of them is labelled so.
    """
    folders = (
        {name.partition("/")[0] if "/" in name else "" for name in source.names} if source.labels is None else set()
    )
    if len(folders) == 1 and folders <= set(known):
        source.classes, source.labels = sorted(folders), np.zeros(len(source), np.int64)
    if source.labels is None:
        if source.unlabelled:
            raise SourceError(f"{source.name} has no class labels: {source.unlabelled}")
        if source.split_folders:
            raise SourceError(
                f"{source.name} holds {', '.join(source.split_folders)}, which are splits, not classes; point at "
                f"one of them, for example {source.name.rstrip('/')}/{source.split_folders[-1]}"
            )
        why = ""
        if len(folders) > 1 and "" in folders:
            stray = [name for name in source.names if "/" not in name]
            why = f": {len(stray)} of its images lie beside the sub-folders ({some(stray, 3)})"
        elif len(folders) == 1 and "" not in folders:
            why = f": all its images lie in one sub-folder, {folders.pop()}"
        raise SourceError(
            f"{source.name} has no class labels{why}; they come from sub-folder names: put the images of each class "
            "into a folder of its own (at least two classes)"
        )
    return source


def labels_of(source: Source) -> np.ndarray:
    """Return the labels (n,) of a source that has them."""
    assert source.labels is not None, "call require_labels first"
    return source.labels


def absent_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """Return the classes without any image, as text; "" if all occur."""
    there = set(np.unique(labels).tolist())
    return some(name for number, name in enumerate(classes) if number not in there)


def renumber_labels(source: Source, classes: Sequence[str], data: str) -> Source:
    """Number the labels of a test source like the training classes. Raises UserError for an unknown class.

    A test set may lack some of the training classes.
    """
    number = {class_name(name): i for i, name in enumerate(classes)}  # earlier versions stored names unnormalised
    if unknown := [name for name in source.classes if name not in number]:
        raise UserError(
            f"{source.name} has classes that {data} does not have ({', '.join(unknown[:6])}); {data} has "
            f"{', '.join(classes[:6])}{' ...' if len(classes) > 6 else ''}: put test images into sub-folders of the "
            "same names"
        )
    source.labels = np.array([number[name] for name in source.classes], np.int64)[labels_of(source)]
    source.classes = list(classes)
    return source
