"""Mark cells of CSV files that a spreadsheet would run as a formula, and unmark them when reading.

Text that starts with = + - @, a tab, a carriage return or a line feed gets an apostrophe in front, which makes
spreadsheets treat it as text (OWASP, CSV injection). Text that starts with an apostrophe gets another one, so that
reading restores every text. Numbers are never marked.
"""

from __future__ import annotations

from typing import Any

MARK = "'"
FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)  # full-width forms too


def marked(value: Any) -> Any:
    """Return the cell to write for a value; values other than text are returned unchanged."""
    return MARK + value if isinstance(value, str) and value.startswith((*FORMULA, MARK)) else value


def unmarked(text: str) -> str:
    """Undo `marked`."""
    return text[1:] if text.startswith(MARK) and text[1:].startswith((*FORMULA, MARK)) else text
