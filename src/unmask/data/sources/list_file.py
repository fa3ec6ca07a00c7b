"""Read list files (one path per line, optionally with a label), and .csv or .tsv tables with a header row.

Paths are relative to the list's folder. Path and label are separated by a tab, a comma, a semicolon or a space. Quoted
cells follow the rules of CSV (RFC 4180): a comma in quotes belongs to the cell, and two quotes stand for one. In a .csv
or .tsv with a header row, columns are found by their names (PATHS, LABELS). # begins a comment. Text is UTF-8 or
UTF-16; a path may contain other bytes, as file names may, but a label may not.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unmask.data.files.text_files import Line, read_lines, require_text
from unmask.data.sources.image_files import EXTENSIONS, FilesSource, absolute_files
from unmask.data.sources.source import Opener, stat_or_none
from unmask.errors import SourceError

LISTS = (".txt", ".lst", ".csv", ".tsv")
SEPARATORS = ("\t", ",", ";", " ")
TABLES = (".csv", ".tsv")
PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "name")
LABELS = ("label", "labels", "class", "class_name", "category", "target", "species")
COMMENT = "#"


class ListError(SourceError):
    """Raised for a list file that cannot be used; the message names the line and the fix."""


class Entry(NamedTuple):
    """One image of a list: its path as written, its label or None, and its line number, from 1."""

    path: str
    label: str | None
    line: int


def read_list(file: str, extensions: Sequence[str]) -> list[Entry]:
    """Return the entries of a list file, in order.

    extensions: lower-case image extensions, by which the path in a line is recognised.
    Raises ListError or TextError (both are SourceError) with the line number, and OSError if the list cannot be read.
    """
    folder = os.path.dirname(os.path.abspath(file))
    lines = list(_logical_lines(file))
    if not lines:
        return []
    columns = _columns(lines[0].text, file, tuple(extensions))
    if columns is not None:
        return [_from_columns(line, columns, file) for line in lines[1:]]
    entries = []
    for place, line in enumerate(lines):
        path, label = _path_and_label(line, folder, file, tuple(extensions))
        if place == 0 and not path.lower().endswith(tuple(extensions)) and not _exists(folder, path):
            continue  # a header row such as "path,label"
        if line.raw and not _exists(folder, path):
            require_text(line, file)
        if label is not None:
            require_text(line._replace(raw=line.raw and not label.isascii()), file)
        entries.append(Entry(path, label, line.number))
    return entries


def _logical_lines(file: str) -> Iterator[Line]:
    """Yield the lines except empty lines and comments; in a table, join the lines of a quoted cell."""
    table = Path(file).suffix.lower() in TABLES
    held: Line | None = None
    for line in read_lines(file):
        if held is not None:
            line = Line(held.number, f"{held.text}\n{line.text}", held.raw or line.raw)
        elif not line.text.strip() or line.text.lstrip().startswith(COMMENT):
            continue
        held = line if table and _opens_quote(line.text) else None
        if held is None:
            yield line._replace(text=line.text.strip())
    if held is not None:
        raise ListError(
            f'line {held.number} of {file} has a quote that is never closed; close it, or write "" for a literal quote'
        )


def _opens_quote(text: str) -> bool:
    """Return whether a quoted cell is still open at the end of the text."""
    inside, begins = False, True  # begins: whether a quote at this position would open a quoted cell
    for letter in text:
        if letter == '"' and (inside or begins):
            inside = not inside
            begins = not inside  # two quotes in a quoted cell stand for one
        elif not inside:
            begins = letter in "\t,;"
    return inside


def _columns(heading: str, file: str, extensions: tuple[str, ...]) -> tuple[str, int, int | None] | None:
    """Return (separator, column of paths, column of labels or None) for a header row, or None for other lines."""
    if Path(file).suffix.lower() not in TABLES:
        return None
    for separator in ("\t", ",", ";"):
        names = [name.strip().lower() for name in _cells(heading, separator) or ()]
        if len(names) < 2 or any(name.endswith(extensions) for name in names):
            continue
        path = next((names.index(name) for name in PATHS if name in names), None)
        if path is None:
            return None
        label = next((names.index(name) for name in LABELS if name in names), None)
        if label is None and len(names) == 2:
            label = 1 - path
        return separator, path, label
    return None


def _from_columns(line: Line, columns: tuple[str, int, int | None], file: str) -> Entry:
    separator, path, label = columns
    cells = _cells(line.text, separator)
    if cells is None or len(cells) <= max(path, label or 0):
        raise ListError(
            f"line {line.number} of {file} has {len(cells or ())} cells, fewer than the header row; quote cells "
            f"that contain {separator!r} or quotes"
        )
    require_text(line, file)
    return Entry(cells[path].strip(), None if label is None else cells[label].strip() or None, line.number)


def _path_and_label(line: Line, folder: str, file: str, extensions: tuple[str, ...]) -> tuple[str, str | None]:
    text = line.text
    if _exists(folder, text):
        return text, None
    if '"' in text:
        for separator in SEPARATORS:
            cells = [cell.strip() for cell in _cells(text, separator) or ()]
            if len(cells) == 2 and cells[0].lower().endswith(extensions):
                return cells[0], cells[1] or None
        if (cells := _cells(text, ",")) and len(cells) == 1:
            return cells[0], None
    for separator in SEPARATORS:
        path, found, label = text.rpartition(separator)
        if found and path.strip().lower().endswith(extensions):
            if label.strip().startswith('"'):
                raise ListError(
                    f"line {line.number} of {file} has unbalanced quotes: {text[:60]!r}; put the whole cell in quotes, "
                    'and write "" for a quote in it'
                )
            return path.strip(), label.strip() or None
    return text, None


def _cells(text: str, separator: str) -> list[str] | None:
    """Return the cells of one CSV record, or None if its quotes are unbalanced."""
    try:
        rows = list(csv.reader([text], delimiter=separator, strict=True, skipinitialspace=separator != " "))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _exists(folder: str, path: str) -> bool:
    return os.path.exists(os.path.join(folder, path))


def open_list(text: str) -> FilesSource:
    """Open the images of a list file, in the order of the list. Raises SourceError."""
    folder = os.path.dirname(os.path.abspath(text))
    try:
        entries = read_list(text, EXTENSIONS)
    except OSError as error:
        raise SourceError(f"cannot read the list {text}: {error.strerror}") from None
    paths = [os.path.join(folder, entry.path) for entry in entries]
    if paths and all(stat_or_none(path) is None for path in paths):
        raise SourceError(
            f"none of the {len(paths)} files listed in {text} exists, for example {paths[0]}; expected paths relative "
            f"to {folder}"
        )
    source = absolute_files(text, paths)
    labels = [entry.label for entry in entries]
    labelled = [label for label in labels if label is not None]
    if not labelled:
        source.label_by_folder()
    elif len(labelled) == len(labels):
        source.label_by(labelled)
    else:
        missing = labels.index(None)
        raise SourceError(
            f"{len(labelled)} of {len(labels)} lines of {text} have a label, but others do not, for example "
            f"{source.names[missing]} in line {entries[missing].line}; add the missing labels, or remove all labels"
        )
    return source


OPENER = Opener("a list file (.txt, .csv)", lambda text: text.lower().endswith(LISTS), open_list)
