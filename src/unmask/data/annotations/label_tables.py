"""Read labels and targets from a table with a column `path` and target columns.

The table is a .csv, .tsv or .parquet file. `path` is the name of an image relative to DATA, as in `Source.names`.
Unless the task is given, it is inferred from the values: one column of text or whole numbers means classification,
several columns of 0 and 1 mean multilabel classification, and columns with fractions mean regression.
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
from unmask.errors import UserError, listed
from unmask.results import CLASSES, MULTILABEL, REGRESSION

TARGETS = (CLASSES, MULTILABEL, REGRESSION)
PATH = "path"

Cell = str | int | float | bool | None
"""One cell of a table, or None for an empty cell."""


@dataclass(frozen=True)
class Table:
    """The content of a table: `paths` (n,) and the cells of every other column."""

    file: str
    paths: list[str]
    columns: dict[str, list[Cell]]


@dataclass(frozen=True)
class Targets:
    """The targets of the images of one source.

    rows: (n,) int64, the images with targets, ascending.
    values: class numbers (n,) int64, or float64 (n, T) for the other two tasks.
    columns: names of the T target columns.
    classes: names of the classes; empty for the other two tasks.
    why: how the task was chosen.
    left_out: number of images that are not in the table.
    unused: paths in the table that are not images of the source.
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
    """The task and the target columns of a table, the same for training and test images.

    why: how the task was chosen.
    """

    task: str
    columns: tuple[str, ...]
    why: str


def read_table(file: str | Path, columns: Sequence[str] | None = None) -> Table:
    """Read a table; `columns` are the target columns, None for all. Raises UserError for an unusable table."""
    file = Path(file)
    lower = file.name.lower()
    if not lower.endswith((".csv", ".tsv", ".parquet", ".pq")):
        raise UserError(f"got {file} for targets; expected a .csv, .tsv or .parquet file with a column `path`")
    if not file.is_file():
        raise UserError(f"the table of targets {file} does not exist; expected a .csv, .tsv or .parquet file")
    found = _read_parquet(file, columns) if lower.endswith((".parquet", ".pq")) else _read_text(file)
    paths = found.pop(PATH, None)
    if paths is None:
        raise UserError(
            f"{file} has no column `path`, only {listed(list(found))}; add it, with each image's path relative to DATA"
        )
    if columns is not None:
        found = _wanted(file, found, columns)
    if not found or not paths:
        raise UserError(f"{file} has {len(found)} target columns and {len(paths)} rows; expected at least one of each")
    if "" in found:
        raise UserError(
            f"{file} has a column without a name, perhaps an index; remove it, or select the targets with --columns A,B"
        )
    if any(_empty(path) for path in paths):
        raise UserError(f"{file} has rows without a `path`; fill in each image's path relative to DATA")
    names = [printable(str(path)).removeprefix("./") for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file} lists {len(twice)} images more than once ({listed(twice)}); give every image one row")
    return Table(str(file), names, found)


def _wanted(file: Path, found: dict[str, list[Cell]], columns: Sequence[str]) -> dict[str, list[Cell]]:
    if missing := [name for name in columns if name not in found]:
        raise UserError(f"{file} has no column {listed(missing)}; expected one of {listed(list(found))}")
    return {name: found[name] for name in columns}


def _read_text(file: Path) -> dict[str, list[Cell]]:
    try:
        lines = io.StringIO(read_text(file), newline="")
        reader = csv.reader(lines, delimiter="\t" if file.name.lower().endswith(".tsv") else ",", strict=True)
        heading = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table with a header row: {error}") from None
    if twice := [name for name, count in Counter(heading).items() if count > 1]:
        raise UserError(f"{file} has two columns named {twice[0]!r}; give each its own name")
    for line, row in rows:
        if len(row) != len(heading):
            raise UserError(
                f"line {line} of {file} has {len(row)} cells; expected {len(heading)}, as in the header row"
            )
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
        raise UserError(
            f"{file} has no column `path`, only {listed(schema.names)}; add it, with each image's path relative to DATA"
        )
    for name in wanted:
        kind = table.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        ):  # fmt: skip
            raise UserError(
                f"column {name} of {file} has the type {kind}; expected text or numbers: select the target columns "
                "with --columns A,B"
            )
    return {name: table.column(name).to_pylist() for name in wanted}


def meaning_of(table: Table, task: str | None = None) -> Meaning:
    """Return the task, given or inferred, and the target columns of a table.

    Raises UserError if the columns do not fit the task, or the task cannot be inferred.
    """
    if task is not None and task not in TARGETS:
        raise UserError(f"got task {task!r}; expected one of {', '.join(TARGETS)}")
    kinds = {name: _kind(cells) for name, cells in table.columns.items()}
    names = tuple(kinds)
    contents = "; ".join(
        f"{kind}: {listed([n for n in names if kinds[n] == kind])}" for kind in dict.fromkeys(kinds.values())
    )
    if task is not None:
        _require_fit(table, task, kinds)
        return Meaning(task, names, f"{task}, as requested ({contents})")
    if len(names) == 1:
        found = REGRESSION if kinds[names[0]] == "fractions" else CLASSES
    elif set(kinds.values()) == {"0 and 1"}:
        found = MULTILABEL
    elif "fractions" in kinds.values() and "texts" not in kinds.values():
        found = REGRESSION
    else:
        raise UserError(
            f"the task is not clear from the {len(names)} target columns of {table.file} ({contents}); select columns "
            "with --columns A,B, or set --target-type: classes needs one column, multilabel 0 and 1, regression numbers"
        )
    return Meaning(found, names, f"{found}, from the columns ({contents})")


def _require_fit(table: Table, task: str, kinds: dict[str, str]) -> None:
    if task == CLASSES and len(kinds) > 1:
        raise UserError(
            f"{table.file} has {len(kinds)} target columns; expected one for classes: select it with --columns"
        )
    for name, kind in kinds.items():
        if task == CLASSES and kind == "fractions":
            raise UserError(
                f"column {name} of {table.file} has fractions; expected text or whole numbers for classes: set "
                "--target-type regression to predict numbers"
            )
        if task == MULTILABEL and kind != "0 and 1":
            raise UserError(f"column {name} of {table.file} has {kind}; expected 0 and 1 for multilabel")
        if task == REGRESSION and kind == "texts":
            raise UserError(f"column {name} of {table.file} has text; expected numbers for regression")


def targets_of(table: Table, source: Source, meaning: Meaning, *, classes: Sequence[str] | None = None) -> Targets:
    """Return the targets of a source's images. classes: names of the training classes, for test images.

    Raises UserError if the table lists none of the images, a target is missing or not a number, or a column of the
    training images has only one value.
    """
    if missing := [name for name in meaning.columns if name not in table.columns]:
        raise UserError(f"{table.file} has no column {listed(missing)}; give both tables the same target columns")
    place = {name: row for row, name in enumerate(source.names)}
    # `unmask predict` marks names that a spreadsheet would run as a formula.
    paths = [name if name in place else unmarked(name) for name in table.paths]
    pairs = sorted((place[name], line) for line, name in enumerate(paths) if name in place)
    if not pairs:
        raise UserError(
            f"none of the {len(table.paths)} paths of {table.file} is an image of {source.name}: the first path is "
            f"{table.paths[0]}, the first image is {source.names[0]}; expected paths relative to DATA"
        )
    rows, lines = np.array([row for row, _ in pairs], np.int64), [line for _, line in pairs]
    cells = {name: [table.columns[name][line] for line in lines] for name in meaning.columns}
    for name, column in cells.items():
        _require_full(table, name, column=column, paths=[table.paths[line] for line in lines], task=meaning.task)
    known: list[str] = []
    if meaning.task == CLASSES:
        texts = [class_name(str(cell)) for cell in cells[meaning.columns[0]]]
        known = list(classes) if classes is not None else class_order(texts)
        if unknown := sorted(set(texts) - set(known)):
            raise UserError(
                f"{table.file} has test images of classes that no training image has: {listed(unknown)}; expected "
                f"classes of the training images, {listed(known)}"
            )
        number = {name: i for i, name in enumerate(known)}
        values = np.array([number[text] for text in texts], np.int64)
    else:
        values = np.array([[_number(cell) for cell in column] for column in cells.values()], np.float64).T
    if classes is None:
        _require_variety(table, meaning, known, values)
    unused = tuple(name for name in paths if name not in place)
    return Targets(
        task=meaning.task,
        columns=meaning.columns,
        classes=known,
        rows=rows,
        values=values,
        why=meaning.why,
        left_out=len(source) - len(rows),
        unused=unused,
    )


def _require_full(table: Table, name: str, column: list[Cell], paths: list[str], task: str) -> None:
    """Raise UserError for an empty cell or a value that is not finite."""
    bad = [path for path, cell in zip(paths, column, strict=True) if _empty(cell)]
    if not bad and task != CLASSES:
        bad = [path for path, cell in zip(paths, column, strict=True) if not math.isfinite(_number(cell))]
    if bad:
        raise UserError(
            f"column {name} of {table.file} has no valid value for {len(bad)} images ({listed(bad)}); fill them in, or "
            "remove those rows: images without a row are left out"
        )


def _require_variety(table: Table, meaning: Meaning, classes: Sequence[str], values: np.ndarray) -> None:
    if meaning.task == CLASSES:
        if len(classes) < 2:
            raise UserError(
                f"all images in {table.file} are of one class ({classes[0]}); expected at least two classes"
            )
        return
    flat = [name for name, column in zip(meaning.columns, values.T, strict=True) if np.ptp(column) == 0]
    if flat:
        raise UserError(
            f"column {listed(flat)} of {table.file} has the same value for all {len(values)} images, so there is "
            "nothing to predict; select other columns with --columns"
        )


def _number(cell: Cell) -> float:
    """Convert a cell. Raises ValueError for text that is not a number."""
    assert cell is not None
    return float(cell)


def _empty(cell: Cell) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)) or str(cell).lower() == "nan"


def _kind(cells: Sequence[Cell]) -> str:
    """Return the kind of a column ("texts", "0 and 1", "whole numbers" or "fractions") from its non-empty cells."""
    present = {cell for cell in cells if not _empty(cell)}
    try:
        numbers = {_number(cell) for cell in present}
    except ValueError:
        return "texts"
    if numbers <= {0.0, 1.0}:
        return "0 and 1"
    whole = all(str(cell).removeprefix("-").isdecimal() for cell in present)
    return "whole numbers" if whole else "fractions"
