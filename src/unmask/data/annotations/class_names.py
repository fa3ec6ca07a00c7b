"""Normalise and sort class names.

Two texts name the same class if they are equal in Unicode's composed form (NFC): macOS stores file names in decomposed
form, while most tools write the composed form. Only class names are normalised, not file names.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

from unmask.console import escape_controls


def class_name(text: str) -> str:
    """Return the normal form of a class name: NFC, with control characters and raw bytes escaped."""
    if text.isascii() and text.isprintable():
        return text
    shown = escape_controls(unicodedata.normalize("NFC", text))
    return shown.replace("\t", "\\t").replace("\n", "\\n")


def class_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names, sorted; if all are whole numbers, sorted as numbers (-1, 9, 10)."""
    names = set(names)
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def are_fractions(names: Iterable[str]) -> bool:
    """Return whether all texts are numbers and some are not whole, so that they are quantities rather than classes."""
    values = []
    for name in names:
        try:
            values.append(float(name))
        except ValueError:
            return False
    return any(not math.isfinite(value) or not value.is_integer() for value in values)
