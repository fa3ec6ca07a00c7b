"""Names of classes: one spelling for one class, one order, and no character that a screen or a file cannot show.

Two texts name one class when they are equal in Unicode's composed form (NFC): macOS stores file names decomposed, most
tools write composed ones. Names of files stay as they are on the disk; only the name of the class is composed.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

from unmask.console import escape_controls


def class_name(text: str) -> str:
    """The name of a class as it is compared, stored and shown: NFC, with control characters and raw bytes escaped."""
    if text.isascii() and text.isprintable():
        return text
    shown = escape_controls(unicodedata.normalize("NFC", text))
    return shown.replace("\t", "\\t").replace("\n", "\\n")


def class_order(names: Iterable[str]) -> list[str]:
    """Distinct names, sorted; whole numbers as numbers, so that 10 comes after 9 and -1 first."""
    names = set(names)
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def are_fractions(names: Iterable[str]) -> bool:
    """Whether the texts are all numbers, and some are not whole: quantities rather than classes."""
    values = []
    for name in names:
        try:
            values.append(float(name))
        except ValueError:
            return False
    return any(not math.isfinite(value) or not value.is_integer() for value in values)
