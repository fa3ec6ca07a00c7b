"""Files of one JSON object a line, of which a crash may tear the last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from unmask.errors import naming


def to_line(row: dict[str, Any]) -> bytes:
    """Return `row` as one line of ASCII, because file names may hold bytes that are not text."""
    return json.dumps(row).encode("ascii") + b"\n"


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one object, on a line of its own even after a torn line. Raises OSError that names the file."""
    with naming(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(to_line(row))


def parse(content: bytes) -> list[dict[str, Any]]:
    """Return the objects in `content`; lines that are not JSON objects, such as a torn one, are skipped."""
    rows: list[dict[str, Any]] = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
