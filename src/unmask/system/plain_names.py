"""Names of run folders and result files, made from names of images: letters, digits and hyphens."""

from __future__ import annotations

from pathlib import Path


def plain_name(path: str) -> str:
    """Return the last part of a path with hyphens for all other characters, but none at the ends."""
    return "".join(letter if letter.isalnum() else "-" for letter in Path(path).name).strip("-")


def default_folder(source: str, ending: str) -> Path:
    """Return runs/SOURCE-ENDING, where SOURCE is the name of the images without their folder and extensions."""
    return Path("runs") / f"{plain_name(Path(source).name.split('.')[0]) or 'images'}-{ending}"
