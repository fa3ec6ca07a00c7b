"""Labels and targets from a table with a column `path` and columns of targets.

A .csv (or .tsv) or .parquet file. `path` is the name of an image relative to DATA, as in `Source.names`. The task is
inferred from the values of the columns unless it is given: one column of texts or whole numbers is classes,
several of 0 and 1 are labels of which an image may have any number, columns with fractions are quantities to predict.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.data.annotations.class_names import class_name, class_order
from unmask.data.files.csv_cells import unmarked
from unmask.data.files.text_files import read_text
from unmask.data.sources.source import Source, printable
from unmask.errors import UserError, some
from unmask.results import CLASSES, MULTILABEL, REGRESSION

TARGETS = (CLASSES, MULTILABEL, REGRESSION)
PATH = "path"

Cell = str | int | float | bool | None
"""One cell of a table; None is empty."""


@dataclass(frozen=True)
class Table:
    """A table as read: `paths` (n,) and the cells of every other column."""

    file: str
    paths: list[str]
    columns: dict[str, list[Cell]]


@dataclass(frozen=True)
class Targets:
    """The targets of the images of one source.

    `rows` (n,) int64 are the images that have any, ascending; `values` int64 (n,) class numbers, or float64 (n, T) for
    the other two tasks. `columns` are the T target columns, `classes` the names of the classes (else empty). `why` says
    how the task was chosen. `left_out` images have no row, `unused` rows of the table no image here.
    """

    task: str
    columns: tuple[str, ...]
    classes: list[str]
    rows: np.ndarray
    values: np.ndarray
    why: str
    left_out: int
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Meaning:
    """The task and the target columns of a table, the same for training and test images; `why` is the reason."""

    task: str
    columns: tuple[str, ...]
    why: str


def read_table(file: str | Path, columns: Sequence[str] | None = None) -> Table:
    """Read a table; `columns` are the target columns, None takes all. Raises UserError for an unusable table."""
    file = Path(file)
    lower = file.name.lower()
    if not lower.endswith((".csv", ".tsv", ".parquet", ".pq")):
        raise UserError(f"got targets {file}; expected a .csv, .tsv or .parquet file with a column `path`")
    if not file.is_file():
        raise UserError(f"the table of targets {file} does not exist; expected a .csv, .tsv or .parquet file")
    found = _read_parquet(file, columns) if lower.endswith((".parquet", ".pq")) else _read_text(file)
    paths = found.pop(PATH, None)
    if paths is None:
        raise UserError(
            f"{file} has no column `path`, only {some(list(found))}; name each image there, relative to DATA"
        )
    if columns is not None:
        found = _wanted(file, found, columns)
    if not found or not paths:
        raise UserError(f"{file} has {len(found)} target columns and {len(paths)} rows; expected at least one of each")
    if "" in found:
        raise UserError(
            f"{file} has a column without a name (an index?); remove it, or choose the targets: --columns A,B"
        )
    if any(_empty(path) for path in paths):
        raise UserError(f"{file} has rows without a `path`; each row must name its image, relative to DATA")
    names = [printable(str(path)).removeprefix("./") for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file} names {len(twice)} images more than once ({some(twice)}); give every image one row")
    return Table(str(file), names, found)


def _wanted(file: Path, found: dict[str, list[Cell]], columns: Sequence[str]) -> dict[str, list[Cell]]:
    if missing := [name for name in columns if name not in found]:
        raise UserError(f"{file} has no column {some(missing)}; it has {some(list(found))}")
    return {name: found[name] for name in columns}


def _read_text(file: Path) -> dict[str, list[Cell]]:
    try:
        lines = io.StringIO(read_text(file), newline="")
        reader = csv.reader(lines, delimiter="\t" if file.name.lower().endswith(".tsv") else ",", strict=True)
        heading = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table with a heading: {error}") from None
    if twice := [name for name, count in Counter(heading).items() if count > 1]:
        raise UserError(f"{file} has two columns called {twice[0]!r}; give each a name of its own")
    for line, row in rows:
        if len(row) != len(heading):
            raise UserError(f"line {line} of {file} has {len(row)} cells, but its heading has {len(heading)}")
    return {name: [row[place].strip() for _, row in rows] for place, name in enumerate(heading)}


def _read_parquet(file: Path, columns: Sequence[str] | None) -> dict[str, list[Cell]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        wanted = [name for name in schema.names if columns is None or name in (PATH, *columns)]
        table = pq.read_table(file, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as a parquet file: {error}") from None
    if PATH not in wanted:
        raise UserError(f"{file} has no column `path`, only {some(schema.names)}; name each image there")
    for name in wanted:
        kind = table.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        ):  # fmt: skip
            raise UserError(
                f"column {name} of {file} holds {kind}; expected text or numbers: name the target columns with "
                "--columns A,B"
            )
    return {name: table.column(name).to_pylist() for name in wanted}


def meaning_of(table: Table, task: str | None = None) -> Meaning:
    """Return the meaning of the columns, inferred or given by `task`. Raises UserError if neither is possible."""
    if task is not None and task not in TARGETS:
        raise UserError(f"got task {task!r}; expected one of {', '.join(TARGETS)}")
    kinds = {name: _kind(cells) for name, cells in table.columns.items()}
    names = tuple(kinds)
    said = "; ".join(
        f"{kind}: {some([n for n in names if kinds[n] == kind])}" for kind in dict.fromkeys(kinds.values())
    )
    if task is not None:
        _require_fit(table, task, kinds)
        return Meaning(task, names, f"{task}, as requested ({said})")
    if len(names) == 1:
        found = REGRESSION if kinds[names[0]] == "fractions" else CLASSES
    elif set(kinds.values()) == {"0 and 1"}:
        found = MULTILABEL
    elif "fractions" in kinds.values() and "texts" not in kinds.values():
        found = REGRESSION
    else:
        raise UserError(
            f"{table.file} has {len(names)} target columns of which the task is not clear ({said}); choose among them "
            "with --columns A,B, or give --target-type: one column for classes, 0 and 1 for multilabel, numbers for "
            "regression"
        )
    return Meaning(found, names, f"{found}, from the columns ({said})")


def _require_fit(table: Table, task: str, kinds: dict[str, str]) -> None:
    if task == CLASSES and len(kinds) > 1:
        raise UserError(f"{table.file} has {len(kinds)} target columns; for classes name one with --columns")
    for name, kind in kinds.items():
        if task == CLASSES and kind == "fractions":
            raise UserError(
                f"column {name} of {table.file} holds fractions, which are no classes; texts or whole numbers were "
                "expected, or --target-type regression"
            )
        if task == MULTILABEL and kind != "0 and 1":
            raise UserError(f"column {name} of {table.file} holds {kind}; expected 0 and 1 for multilabel")
        if task == REGRESSION and kind == "texts":
            raise UserError(f"column {name} of {table.file} holds text; expected numbers for regression")


def targets_of(table: Table, source: Source, meaning: Meaning, *, classes: Sequence[str] | None = None) -> Targets:
    """Return the targets of a source's images. classes: those of the training images, for test images.

    Raises UserError when no row names an image, a target is missing or not a number, or nothing varies.
    """
    if missing := [name for name in meaning.columns if name not in table.columns]:
        raise UserError(f"{table.file} has no column {some(missing)}; both tables need the same targets")
    place = {name: row for row, name in enumerate(source.names)}
    paths = [name if name in place else unmarked(name) for name in table.paths]  # `unmask predict` marks formulas
    pairs = sorted((place[name], line) for line, name in enumerate(paths) if name in place)
    if not pairs:
        raise UserError(
            f"none of the {len(table.paths)} paths of {table.file} is an image of {source.name}: the first path is "
            f"{table.paths[0]}, the first image {source.names[0]}; paths must be relative to DATA"
        )
    rows, lines = np.array([row for row, _ in pairs], np.int64), [line for _, line in pairs]
    cells = {name: [table.columns[name][line] for line in lines] for name in meaning.columns}
    for name, column in cells.items():
        _require_full(table, name, column, [table.paths[line] for line in lines], meaning.task)
    known: list[str] = []
    if meaning.task == CLASSES:
        texts = [class_name(str(cell)) for cell in cells[meaning.columns[0]]]
        known = list(classes) if classes is not None else class_order(texts)
        if unknown := sorted(set(texts) - set(known)):
            raise UserError(
                f"{table.file} has test images of classes that no training image has: {some(unknown)}; the training "
                f"images have {some(known)}"
            )
        number = {name: i for i, name in enumerate(known)}
        values = np.array([number[text] for text in texts], np.int64)
    else:
        values = np.array([[_number(cell) for cell in column] for column in cells.values()], np.float64).T
    if classes is None:
        _require_variety(table, meaning, known, values)
    unused = tuple(name for name in paths if name not in place)
    return Targets(meaning.task, meaning.columns, known, rows, values, meaning.why, len(source) - len(rows), unused)


def _require_full(table: Table, name: str, column: list[Cell], paths: list[str], task: str) -> None:
    """Raise UserError for a cell without a value or with one that is not finite."""
    bad = [path for path, cell in zip(paths, column, strict=True) if _empty(cell)]
    if not bad and task != CLASSES:
        bad = [path for path, cell in zip(paths, column, strict=True) if not math.isfinite(_number(cell))]
    if bad:
        raise UserError(
            f"column {name} of {table.file} has no number or text for {len(bad)} images ({some(bad)}); fill it in, or "
            "remove those rows: images without a row are left out"
        )


def _require_variety(table: Table, meaning: Meaning, classes: Sequence[str], values: np.ndarray) -> None:
    if meaning.task == CLASSES:
        if len(classes) < 2:
            raise UserError(f"all images in {table.file} are of one class ({classes[0]}); expected at least two")
        return
    flat = [name for name, column in zip(meaning.columns, values.T, strict=True) if np.ptp(column) == 0]
    if flat:
        raise UserError(
            f"column {some(flat)} of {table.file} has one value for all {len(values)} images; there is nothing to "
            "predict: leave it out with --columns"
        )


def _number(cell: Cell) -> float:
    """Convert a cell. Raises ValueError for text that is not a number."""
    assert cell is not None
    return float(cell)


def _empty(cell: Cell) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)) or str(cell).lower() == "nan"


def _kind(cells: Sequence[Cell]) -> str:
    """ "texts", "0 and 1", "whole numbers" or "fractions", by the cells that are not empty."""
    present = {cell for cell in cells if not _empty(cell)}
    try:
        numbers = {_number(cell) for cell in present}
    except ValueError:
        return "texts"
    if numbers <= {0.0, 1.0}:
        return "0 and 1"
    whole = all(str(cell).removeprefix("-").isdecimal() for cell in present)
    return "whole numbers" if whole else "fractions"
