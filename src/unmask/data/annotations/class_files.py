"""Find and read the files in which annotation tools write the class names of segmentation masks.

- `classes.txt`, `codes.txt`, `*.names` and similar: one name per line, for ids 0, 1, 2 ..., or a number and a name.
- `label_colors.txt`, `labelmap.txt`: a colour and a name (CamVid), or `name:colour:...` (CVAT), in the order of ids.
- `*.csv` with a header row: a column `name` (or `class`, `label`), optionally with a column `id`.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from unmask.data.annotations.class_names import class_name
from unmask.data.files.text_files import TextError, read_text
from unmask.errors import UserError

NAMES = (
    "classes.txt", "class_names.txt", "codes.txt", "label_names.txt", "labels.txt", "label_colors.txt",
    "label_colours.txt", "labelmap.txt", "label_map.txt", "class_dict.csv", "classes.csv",
)  # fmt: skip
PATTERNS = ("*.names",)
TITLES, NUMBERS = ("name", "class", "class_name", "label"), ("id", "index", "number", "value", "class_id")
COLOUR_FIRST = re.compile(r"^(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,:]+(.+)$")
COLOUR_LAST = re.compile(r"^([^:]+):\s*(?:\d{1,3}\s*,\s*\d{1,3}\s*,\s*\d{1,3})?\s*(?::|$)")  # CVAT
NUMBERED = re.compile(r"^(\d{1,5})\s*[:,;\t ]\s*(\S.*)$")


def find_class_files(folders: Sequence[Path]) -> list[Path]:
    """Return the files in these folders that probably contain class names, the most likely first."""
    found = [folder / name for folder in folders for name in NAMES if (folder / name).is_file()]
    found += [file for folder in folders for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    return list(dict.fromkeys(found))


def read_class_list(file: Path) -> list[str]:
    """Read the names of ids 0, 1, 2 ... from a file with one name per line. Raises UserError for an unusable file."""
    names = [class_name(line.strip()) for line in _read(file).split("\n")]
    while names and not names[-1]:
        names.pop()
    _require_distinct(names, file)
    return names


def read_class_file(file: Path) -> dict[int, str]:
    """Read the name of each id from a file in one of these formats. Raises UserError for an unusable file."""
    text = _read(file)
    names = _from_table(text) if file.suffix.lower() == ".csv" else None
    if names is None:
        names = _from_lines([line.strip() for line in text.split("\n")])
    _require_distinct(names.values(), file)
    return dict(sorted(names.items()))


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except TextError as error:
        raise UserError(f"cannot read class names from {file}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _require_distinct(names: Collection[str], file: Path) -> None:
    double = [name for name, count in Counter(names).items() if count > 1 or not name]
    if double or not names:
        what = "no name"
        if double:
            what = f"the name {double[0]!r} more than once" if double[0] else "an empty name"
        raise UserError(f"{file} has {what}; expected a different name for each of ids 0, 1, 2 ..., one per line")


def _from_lines(lines: list[str]) -> dict[int, str]:
    while lines and not lines[-1]:
        lines.pop()
    full = [line for line in lines if line and not line.startswith("#")]
    for pattern, group in ((COLOUR_FIRST, 4), (COLOUR_LAST, 1)):
        matched = [pattern.match(line) for line in full]
        if full and all(matched):
            return {i: class_name(found[group].strip()) for i, found in enumerate(matched) if found}
    numbered = [NUMBERED.match(line) for line in full]
    if full and all(numbered):
        return {int(found[1]): class_name(found[2].strip()) for found in numbered if found}
    return {i: class_name(line) for i, line in enumerate(lines)}


def _from_table(text: str) -> dict[int, str] | None:
    """Read names from a table with a header row, or return None without a header row."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    heading = [cell.lower() for cell in rows[0]] if rows else []
    title = next((heading.index(name) for name in TITLES if name in heading), None)
    number = next((heading.index(name) for name in NUMBERS if name in heading), None)
    if title is None:
        return None
    wide = [row for row in rows[1:] if len(row) == len(heading)]
    if number is not None and all(row[number].isdecimal() for row in wide):
        return {int(row[number]): class_name(row[title]) for row in wide}
    return {i: class_name(row[title]) for i, row in enumerate(wide)}
