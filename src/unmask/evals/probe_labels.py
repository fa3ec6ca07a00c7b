"""What a probe is asked, and the labelled images it is asked on: training and test images parted, shots chosen.

The labels are folder names, or columns of a table (`data/label_tables.py`). The split and the shots depend on the seed
and on the images' rows alone. Nothing is decoded here; see `evals/feature_sets.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.console import Console
from unmask.data.annotations.label_tables import CLASSES, Targets, meaning_of, read_table, targets_of
from unmask.data.annotations.labels import absent_classes, labels_of, require_labels, with_classes
from unmask.data.annotations.splits import HOLD_OUT_FOR_TEST, hold_out
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.errors import UserError
from unmask.evals.probe import (
    Aim,
    few_shots,
    require_classes,
)

DRAWS, MOST_DRAWS = 5, 1000


@dataclass(frozen=True)
class Asked:
    """What a person wants to know; as the arguments of `probe_kinds`."""

    data: str
    test: str | None
    shots: int | Sequence[int] | None
    controls: bool
    seed: int
    step: int | None
    layer: str | None
    masks: int | None
    draws: int | None
    against: Sequence[Path]
    targets: Path | None
    test_targets: Path | None
    columns: Sequence[str] | None
    task: str | None
    exclude: tuple[str, ...] = ()

    @property
    def images(self) -> str:
        """What the result calls the labelled images: other ones when some are excluded."""
        return self.data + (f" without {' '.join(self.exclude)}" if self.exclude else "")

    @property
    def budgets(self) -> Sequence[int | None]:
        """Labels per class, ascending; None for all."""
        return [self.shots] if self.shots is None or isinstance(self.shots, int) else sorted(set(self.shots))

    @property
    def curve(self) -> bool:
        return self.draws is not None or len(self.budgets) > 1

    @property
    def num_draws(self) -> int:
        """Choices of labels for each budget."""
        return (DRAWS if self.draws is None else self.draws) if self.curve else 1


@dataclass(frozen=True)
class Labelled:
    """Training and test images, and what they are labelled with.

    `train_y` and `test_y` have a row for every image of their source; those of images outside `train_rows` and
    `test_rows` may mean nothing.
    """

    aim: Aim
    train: Source
    train_rows: np.ndarray
    train_y: np.ndarray
    test: Source
    test_rows: np.ndarray
    test_y: np.ndarray
    why: str = ""
    without: int = 0


@dataclass(frozen=True)
class Pick:
    """The training images of one fit: `shots` of every class, or None for all. `rows` of the source, `places` among
    the features."""

    shots: int | None
    rows: np.ndarray
    places: np.ndarray


def require_asked(asked: Asked) -> None:
    """Raises UserError for what would be ignored, before anything is read."""
    if asked.draws is not None and asked.shots is None:
        raise UserError(
            f"--draws {asked.draws} came without --shots, so there is nothing to draw; say how many labels per class, "
            "for example --shots 1,5,10"
        )
    if asked.draws is not None and asked.draws < 2:
        raise UserError(f"--draws {asked.draws} came; at least 2 were expected, {DRAWS} or more for a narrow interval")
    if asked.num_draws > MOST_DRAWS:
        raise UserError(f"--draws {asked.draws} came; at most {MOST_DRAWS} were expected, {DRAWS} to 20 is usual")
    if not asked.budgets:
        raise UserError("no number of labels per class came; at least one was expected, for example --shots 1,5,10")
    idle = {"--test-targets": asked.test_targets, "--columns": asked.columns, "--task": asked.task}
    if asked.targets is None and (given := [name for name, value in idle.items() if value is not None]):
        raise UserError(f"{', '.join(given)} came without --targets, and would be ignored; give the table too")
    if asked.test_targets is not None and asked.test is None:
        raise UserError("--test-targets came without --test, and would be ignored; give the test images too")


def shots_of(text: str | None) -> int | list[int] | None:
    """What --shots says: 5 is one number of labels per class, 1,5,10 a curve. Raises UserError for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--shots {text} came; a number of labels per class, or several as 1,5,10 was expected")
    numbers = [int(part) for part in parts]
    return numbers if len(numbers) > 1 else numbers[0]


def read_labels(asked: Asked, console: Console) -> Labelled:
    """Open the images with their labels, and part training from test images."""
    if asked.targets is not None:
        return _read_table(asked, asked.targets, console)
    train = require_labels(open_source(asked.data, asked.exclude))
    require_classes(train.classes)
    train_y, aim = labels_of(train), Aim(CLASSES, train.classes)
    if asked.test is None:
        rows, test_rows = _part(train_y, np.arange(len(train)), asked)
        return Labelled(aim, train, rows, train_y, train, test_rows, train_y)
    other = with_classes(
        require_labels(open_source(asked.test, asked.exclude), train.classes), train.classes, asked.data
    )
    if absent := absent_classes(labels_of(other), train.classes):
        console.warn(f"{asked.test} has no image of {absent}: those classes are not tested")
    return Labelled(aim, train, np.arange(len(train)), train_y, other, np.arange(len(other)), labels_of(other))


def _part(strata: np.ndarray, rows: np.ndarray, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, test rows): a fifth of every stratum of `rows` is held out."""
    train, held = hold_out(strata, rows, asked.seed, HOLD_OUT_FOR_TEST)
    if not len(held):
        raise UserError(f"{asked.data} has one image per class, so none can be held out; give other images with --test")
    return rows[train], rows[held]


def _read_table(asked: Asked, targets: Path, console: Console) -> Labelled:
    data, test, test_targets = asked.data, asked.test, asked.test_targets
    table = read_table(targets, asked.columns)
    meaning = meaning_of(table, asked.task)
    train = open_source(data, asked.exclude)
    found = targets_of(table, train, meaning)
    aim, values = Aim(found.task, found.classes or found.columns), _by_row(found, train)
    without, unused = found.left_out, set(found.unused)
    if test is None:
        strata = found.values if found.task == CLASSES else np.zeros(len(found.rows), np.int64)
        rows, test_rows = _part(strata, found.rows, asked)
        labelled = Labelled(aim, train, rows, values, train, test_rows, values, found.why, without)
    else:
        other = open_source(test, asked.exclude)
        if test_targets is None and (both := sorted(set(other.names) & set(train.names) & set(table.paths))):
            raise UserError(
                f"{both[0]} is an image of {data} and of {test}, so {targets} does not say which is meant; give the "
                "test images a table of their own with --test-targets"
            )
        second = table if test_targets is None else read_table(test_targets, meaning.columns)
        there = targets_of(second, other, meaning, classes=found.classes)
        unused = unused & set(there.unused) if test_targets is None else unused | set(there.unused)
        without += there.left_out
        labelled = Labelled(
            aim, train, found.rows, values, other, there.rows, _by_row(there, other), found.why, without
        )
    for source in (labelled.train, labelled.test):
        source.labels, source.classes = None, []  # those of the folders, if any, are not what is asked for
    console.say(f"targets of {targets}: {found.why}; {len(table.paths) - len(unused)} rows have an image")
    if without:
        console.warn(f"{without} images have no row in {test_targets or targets} and are left out")
    if unused:
        console.warn(f"{len(unused)} rows of {targets} name no image and are not used, for example {sorted(unused)[0]}")
    return labelled


def _by_row(found: Targets, source: Source) -> np.ndarray:
    """The values with a row for every image of the source."""
    values = np.zeros((len(source), *found.values.shape[1:]), found.values.dtype)
    values[found.rows] = found.values
    return values


def pick(labelled: Labelled, rows: np.ndarray, budgets: Sequence[int | None], draws: int, seed: int) -> list[Pick]:
    """The training images of every fit."""
    y, names = labelled.train_y[rows], labelled.aim.names
    return [
        Pick(shots, rows if shots is None else few_shots(rows, y, names, shots, seed, draw=draw), np.zeros(0, np.int64))
        for shots in budgets
        for draw in range(draws)
    ]
