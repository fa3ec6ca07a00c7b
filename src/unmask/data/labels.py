"""Labels of a source, and the classes of test images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.data.class_names import class_name
from unmask.data.sources.open_source import Source
from unmask.errors import UserError, some


def labels_of(source: Source) -> np.ndarray:
    """The labels (n,) of a source that has them."""
    assert source.labels is not None, "require_labels came first"
    return source.labels


def absent_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """The classes that no image has, in words; "" where all occur."""
    there = set(np.unique(labels).tolist())
    return some(name for number, name in enumerate(classes) if number not in there)


def with_classes(source: Source, classes: Sequence[str], data: str) -> Source:
    """The test source with its labels numbered like the training classes. Raises ValueError for a class not among them.

    Images without any class that the training set has are no fault: a test set may lack some.
    """
    number = {class_name(name): i for i, name in enumerate(classes)}  # of runs of earlier versions too
    if unknown := [name for name in source.classes if name not in number]:
        raise UserError(
            f"{source.name} has classes that {data} has not ({', '.join(unknown[:6])}); {data} has "
            f"{', '.join(classes[:6])}{' ...' if len(classes) > 6 else ''}: test images must lie in sub-folders of the "
            "same names"
        )
    source.labels = np.array([number[name] for name in source.classes], np.int64)[labels_of(source)]
    source.classes = list(classes)
    return source
