"""Read patch masks from a file. A patch mask is one string per row of patches: "#" hides a patch, "." shows it.

A text file contains one or more such masks, separated by empty lines. A .npy file contains an array (rows, cols) or
(n, rows, cols) in which values other than 0 hide a patch. A PNG has one pixel per patch; dark pixels hide their patch.
The method that uses a patch mask checks whether it fits the grid (`nn/masks.py`).
"""

from __future__ import annotations

import tokenize
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unmask.errors import UserError

MOST_MARKS = 1 << 24
MOST_PATTERNS = 10_000

Pattern = tuple[str, ...]


def read_masks(path: str | Path) -> tuple[Pattern, ...]:
    """Return the patch masks of a file. Raises UserError for a missing or unusable file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"patch mask file {path} does not exist; expected a .txt, .npy or .png file")
    try:
        if path.suffix == ".npy":  # memory-mapped, so that a false header allocates nothing
            return _of_array(np.load(path, allow_pickle=False, mmap_mode="r"), path)
        if path.suffix == ".png":
            with Image.open(path) as picture:
                _require_few(picture.width * picture.height, path)
                return _of_array(np.asarray(picture.convert("L")) < 128, path)
        _require_few(path.stat().st_size, path)
        return _of_text(path.read_text("utf-8"), path)
    except (ValueError, EOFError, OSError, SyntaxError, AttributeError, MemoryError, zipfile.BadZipFile,
            tokenize.TokenError, Image.DecompressionBombError) as error:  # fmt: skip
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"patch mask file {path} cannot be read ({type(error).__name__}); expected a .txt file of '#' and '.', a "
            ".npy array of shape (rows, cols) or (n, rows, cols), or a .png with one pixel per patch"
        ) from None


def _require_few(marks: int, path: Path) -> None:
    if marks > MOST_MARKS:
        raise UserError(
            f"patch mask file {path} has {marks} values; expected at most {MOST_MARKS}, one per patch of each mask: "
            "give the grid of patches, not the pixels"
        )


def hidden_share(patterns: Sequence[Pattern]) -> float:
    """Return the share of hidden patches in the first patch mask."""
    marks = "".join(patterns[0])
    return marks.count("#") / max(1, len(marks))


def _of_text(text: str, path: Path) -> tuple[Pattern, ...]:
    expected = "expected rows of '#' (hidden) and '.' (visible), one character per patch"
    for number, line in enumerate(text.split("\n"), 1):
        if wrong := line.lstrip("#. ")[:1]:
            raise UserError(f"patch mask file {path} has {wrong!r} in line {number}; {expected}")
    blocks = [tuple(block.split()) for block in text.strip().split("\n\n")]
    patterns = tuple(block for block in blocks if block)
    if not patterns:
        raise UserError(f"patch mask file {path} is empty; {expected}")
    return patterns


def _of_array(array: np.ndarray, path: Path) -> tuple[Pattern, ...]:
    array = array[None] if array.ndim == 2 else array
    _require_few(array.size, path)
    if array.ndim != 3 or not array.size or len(array) > MOST_PATTERNS or array.dtype.kind not in "biuf":
        raise UserError(
            f"patch mask file {path} has an array of {array.dtype} of shape {array.shape}; expected numbers of shape "
            f"(rows, cols) or (n, rows, cols), n at most {MOST_PATTERNS}, in which values other than 0 hide a patch"
        )
    return tuple(tuple("".join("#" if mark else "." for mark in row) for row in pattern) for pattern in array)
