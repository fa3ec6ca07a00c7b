"""Cells of CSV files that a spreadsheet would run as a formula: marked when written, unmarked when read.

A text that begins with = + - @, a tab, a carriage return or a line feed gets an apostrophe before it, which is what a
spreadsheet takes for "this is text" (OWASP, CSV injection). So that every text reads back as it was, one that begins
with an apostrophe gets another. Numbers are never marked.
"""

from __future__ import annotations

from typing import Any

MARK = "'"
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last: full-width forms


def marked(value: Any) -> Any:
    """A cell to write; anything but text is returned as it is."""
    return MARK + value if isinstance(value, str) and value.startswith((*FORMULA, MARK)) else value


def unmarked(text: str) -> str:
    """What `marked` was given."""
    return text[1:] if text.startswith(MARK) and text[1:].startswith((*FORMULA, MARK)) else text
