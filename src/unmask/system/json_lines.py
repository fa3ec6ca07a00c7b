"""Files with one JSON object per line. A crash may truncate the last line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from unmask.errors import name_in_errors


def to_line(row: dict[str, Any]) -> bytes:
    """Return `row` as one line of ASCII, because file names may contain bytes that are not valid UTF-8."""
    return json.dumps(row).encode("ascii") + b"\n"


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one object on a new line, even if the last line is truncated. Raises OSError with the file's name."""
    with name_in_errors(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(to_line(row))


def parse(content: bytes) -> list[dict[str, Any]]:
    """Return the objects in `content`. Lines that are not JSON objects, such as a truncated one, are skipped."""
    rows: list[dict[str, Any]] = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
