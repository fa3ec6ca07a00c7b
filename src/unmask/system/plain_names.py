"""Make names of run folders and result files, of letters, digits and hyphens, from names of images."""

from __future__ import annotations

from pathlib import Path


def plain_name(path: str) -> str:
    """Return the last part of a path, with hyphens in place of all characters except letters and digits.

    The returned name neither begins nor ends with a hyphen.
    """
    return "".join(letter if letter.isalnum() else "-" for letter in Path(path).name).strip("-")


def default_folder(source: str, ending: str) -> Path:
    """Return runs/SOURCE-ENDING, where SOURCE is the name of the images without their folder and extensions."""
    return Path("runs") / f"{plain_name(Path(source).name.split('.')[0]) or 'images'}-{ending}"
