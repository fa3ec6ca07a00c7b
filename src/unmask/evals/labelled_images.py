"""Open the labelled images of a probe, split them into training and test images, and draw labels.

Labels are folder names, or columns of a table (`data/annotations/label_tables.py`). The split and the draw of labels
depend only on the seed and on the rows of the images in their source. Images are decoded later, in `evals/images.py`.

Letters: n training images, T target columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from unmask.console import Console
from unmask.data.annotations.label_tables import Targets, meaning_of, read_table, targets_of
from unmask.data.annotations.labels import absent_classes, labels_of, renumber_labels, require_labels
from unmask.data.annotations.splits import FIRST_DRAW, HELD_OUT, HOLD_OUT_FOR_TEST, SHOTS, hold_out
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.errors import UserError
from unmask.evals.probe_options import ProbeOptions
from unmask.results import CLASSES, ImageSet, TargetTable, TestIdentity
from unmask.rng import Stream, words


@dataclass(frozen=True)
class Labelling:
    """The kind of labels: `task` (CLASSES, MULTILABEL or REGRESSION) and `names` of the classes or columns."""

    task: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images with their labels.

    `train_y` and `test_y` have a row for every image of their source; values outside `train_rows` and `test_rows` are
    undefined. table: the table of labels, or None if folder names are the labels.
    """

    labelling: Labelling
    train: Source
    train_rows: np.ndarray
    train_y: np.ndarray
    test: Source
    test_rows: np.ndarray
    test_y: np.ndarray
    table: TargetTable | None = None

    def summary(self) -> str:
        """Return the numbers of images, and a fingerprint of files, split and labels, to compare several hosts."""
        digest = blake2b(digest_size=8)
        for source, rows, y in ((self.train, self.train_rows, self.train_y), (self.test, self.test_rows, self.test_y)):
            digest.update(source.fingerprint().encode())
            digest.update(np.asarray(rows, np.int64).tobytes())
            digest.update(np.ascontiguousarray(y[rows]).tobytes())
        numbers = f"{len(self.train_rows)} training and {len(self.test_rows)} test images"
        return f"{numbers} with fingerprint {digest.hexdigest()}"


@dataclass(frozen=True)
class TrainingSet:
    """The training images of one fit.

    shots: images per class, or None for all. rows: rows of the images in their source. positions: rows of the same
    images in the tables of features.
    """

    shots: int | None
    rows: np.ndarray
    positions: np.ndarray


def open_labelled_images(options: ProbeOptions, console: Console) -> LabelledImages:
    """Open the images with their labels, and split them into training and test images."""
    if options.targets is not None:
        return _open_with_table(options, Path(options.targets), console)
    train = require_labels(open_source(options.data, options.exclude))
    require_classes(train.classes)
    train_y, labelling = labels_of(train), Labelling(CLASSES, tuple(train.classes))
    if options.test is None:
        rows, test_rows = _split(train_y, np.arange(len(train)), options)
        return LabelledImages(
            labelling=labelling,
            train=train,
            train_rows=rows,
            train_y=train_y,
            test=train,
            test_rows=test_rows,
            test_y=train_y,
        )
    test = require_labels(open_source(options.test, options.exclude), train.classes)
    test = renumber_labels(test, train.classes, str(options.data))
    if absent := absent_classes(labels_of(test), train.classes):
        console.warn(f"{options.test} has no images of {absent}: these classes are not tested")
    return LabelledImages(
        labelling=labelling,
        train=train,
        train_rows=np.arange(len(train)),
        train_y=train_y,
        test=test,
        test_rows=np.arange(len(test)),
        test_y=labels_of(test),
    )


def _split(strata: np.ndarray, rows: np.ndarray, options: ProbeOptions) -> tuple[np.ndarray, np.ndarray]:
    """Split `rows` into training and test rows, holding out a fifth of every stratum."""
    train, held = hold_out(strata, rows, options.seed, HOLD_OUT_FOR_TEST)
    if not len(held):
        raise UserError(
            f"got one image per class in {options.data}, so none can be held out; give separate test images with --test"
        )
    return rows[train], rows[held]


def _open_with_table(options: ProbeOptions, path: Path, console: Console) -> LabelledImages:
    """Open the images with the labels of a table, and split them into training and test images."""
    table = read_table(path, options.columns)
    meaning = meaning_of(table, options.target_type)
    train = open_source(options.data, options.exclude)
    found = targets_of(table, train, meaning)
    labelling, values = Labelling(found.task, tuple(found.classes or found.columns)), _by_row(found, train)
    without_row, unused = found.left_out, set(found.unused)
    if options.test is None:
        strata = found.values if found.task == CLASSES else np.zeros(len(found.rows), np.int64)
        rows, test_rows = _split(strata, found.rows, options)
        test, test_y = train, values
    else:
        rows, test = found.rows, open_source(options.test, options.exclude)
        if options.test_targets is None:
            _require_unambiguous(options, train, test, table.paths)
            second = table
        else:
            second = read_table(Path(options.test_targets), meaning.columns)
        there = targets_of(second, test, meaning, classes=found.classes)
        unused = unused & set(there.unused) if second is table else unused | set(there.unused)
        without_row += there.left_out
        test_rows, test_y = there.rows, _by_row(there, test)
    for source in (train, test):
        source.labels, source.classes = None, []  # folder names are not used as labels here
    console.print(f"targets of {path}: {found.why}; {len(table.paths) - len(unused)} rows have an image")
    if without_row:
        console.warn(f"{without_row} images have no row in {options.test_targets or path} and are left out")
    if unused:
        console.warn(f"{len(unused)} rows of {path} match no image and are not used, for example {sorted(unused)[0]}")
    about = TargetTable(
        path=str(path),
        test_path=None if options.test_targets is None else str(options.test_targets),
        columns=None if options.columns is None else tuple(options.columns),
        reason=found.why,
        images_without_row=without_row,
    )
    return LabelledImages(
        labelling=labelling,
        train=train,
        train_rows=rows,
        train_y=values,
        test=test,
        test_rows=test_rows,
        test_y=test_y,
        table=about,
    )


def _require_unambiguous(options: ProbeOptions, train: Source, test: Source, paths: Sequence[str]) -> None:
    """Raise UserError if a row of the table matches both a training and a test image."""
    if both := sorted(set(test.names) & set(train.names) & set(paths)):
        raise UserError(
            f"got an image {both[0]} in both {options.data} and {options.test}, so its row in {options.targets} is "
            "ambiguous; give the test images a separate table with --test-targets"
        )


def _by_row(found: Targets, source: Source) -> np.ndarray:
    """Return the target values expanded to one row per image of the source."""
    values = np.zeros((len(source), *found.values.shape[1:]), found.values.dtype)
    values[found.rows] = found.values
    return values


def image_set(name: str, source: Source, excluded: Sequence[str]) -> ImageSet:
    """Return the record of a data source that a result stores. name: path under which the source was opened."""
    path = Path(name).absolute()
    return ImageSet(
        name=name, path=str(path) if path.exists() else None, digest=source.fingerprint(), excluded=tuple(excluded)
    )


def identity_of_test(options: ProbeOptions, test: Source) -> TestIdentity:
    """Return the record of the test images that a result stores."""
    if options.test is None:
        return TestIdentity(held_out=HELD_OUT, seed=options.seed)
    return TestIdentity(images=image_set(options.test, test, options.exclude))


def training_sets(images: LabelledImages, rows: np.ndarray, options: ProbeOptions, *, draws: int) -> list[TrainingSet]:
    """Return the training images of every fit, with empty `positions`, which the caller sets.

    rows: rows of the images from which labels are drawn. draws: number of random draws for every number of labels.
    """
    y, names = images.train_y[rows], images.labelling.names
    nowhere = np.zeros(0, np.int64)
    return [
        TrainingSet(
            shots,
            rows if shots is None else few_shots(rows, y, classes=names, shots=shots, seed=options.seed, draw=draw),
            nowhere,
        )
        for shots in options.budgets
        for draw in range(draws)
    ]


def require_classes(classes: Sequence[str]) -> None:
    """Raise UserError for fewer than two classes."""
    if len(classes) < 2:
        raise UserError(
            f"got {len(classes)} classes ({', '.join(classes) or 'none'}); expected at least two: put the images of "
            "each class into a sub-folder"
        )


def require_two(labels: np.ndarray) -> None:
    """Raise UserError if all training images have the same class."""
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"got {len(labels)} training images, all of one class; expected at least two classes; give images of "
            "another class too"
        )


def few_shots(
    index: np.ndarray, labels: np.ndarray, classes: Sequence[str], shots: int, seed: int, *, draw: int = 0
) -> np.ndarray:
    """Select `shots` images of every class at random, and return their rows, sorted.

    index: (n,), rows of the images in their source. labels: (n,), their classes. draw: number of the random draw. The
    images selected for `shots` are among those for `shots + 1` with the same seed and draw. Raises UserError if `shots`
    is less than 1 or larger than the number of images of a class.
    """
    if shots < 1:
        raise UserError(f"got {shots} labels per class; expected at least 1")
    counts = np.bincount(labels, minlength=len(classes))
    smallest = int(counts.argmin())
    if counts[smallest] < shots:
        raise UserError(
            f"got --shots {shots}, but class {classes[smallest]!r} has only {counts[smallest]} training images; use "
            f"--shots {max(1, counts[smallest])} or fewer, or leave it out to use all"
        )
    epoch = np.full_like(index, FIRST_DRAW + draw if draw else SHOTS)
    order = np.lexsort((index, np.asarray(words(seed, Stream.LABELS, epoch, index, 1))[:, 0]))
    return np.sort(np.concatenate([index[order][labels[order] == label][:shots] for label in range(len(classes))]))
