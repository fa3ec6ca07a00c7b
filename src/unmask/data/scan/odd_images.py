"""Find images that are probably not training images: segmentation masks among photographs, and constant images.

Segmentation masks have few colours while the other images have many. Masks are expected in a folder with a typical
name, in a folder with the same file names as another folder, or beside their image with a suffix such as _mask. A
sample of each folder is decoded.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.data.decode import decode
from unmask.data.decode.bad_image import BadImage
from unmask.data.scan.scan_cache import FileRecords
from unmask.data.sources.source import Source
from unmask.errors import listed

FOLDERS = re.compile(
    r"(labels?|masks?|annotations?|annots?|segmentations?|segmentation(class|object)(aug)?|segs?|gt(fine|coarse)?|"
    r"ground_?truths?|targets?|trainannot|valannot|testannot)([_-]\w+)?|\w+[_-](labels?|masks?|gt|annotations?|seg)",
    re.IGNORECASE,
)
ENDINGS = re.compile(
    r"[_-](masks?|labels?|segs?|segmentations?|gt|groundtruth|annotations?|l|labelids|labeltrainids|instanceids|color|"
    r"gtfine_\w+)$",
    re.IGNORECASE,
)
SAMPLE = 6  # Number of images decoded in each group.
FEW, LEAST_PIXELS = 40, 400  # Maximum number of colours of a mask, and minimum number of pixels to examine an image.
MOST_FOLDERS, MOST_NAMES = 64, 200_000  # Names are not compared in larger data sets.
ROUNDING = 1e-10  # Relative rounding error of the sums of a constant float image.
MIRRORED = 0.5  # Minimum share of a folder's names that occur in another folder too.


@dataclass(frozen=True)
class MaskLike:
    """A group of images that look like segmentation masks.

    where: folder or suffix of the masks. count: number of masks. images: folder of the other images. pattern:
    matches the masks, for --exclude.
    """

    where: str
    count: int
    images: str
    pattern: str


def mask_like(source: Source) -> list[MaskLike]:
    """Return groups of the source's images that look like masks of the others."""
    folders: dict[str, list[int]] = {}
    for row, name in enumerate(source.names):
        folders.setdefault(name.rpartition("/")[0], []).append(row)
    return _by_folder(source, _tops(folders)) + _by_ending(source, folders)


def _tops(folders: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return rows by the part of the path that may distinguish masks from images, such as `labels` in labels/train."""
    found: dict[str, list[int]] = {}
    for folder, rows in folders.items():
        parts = folder.split("/") if folder else [""]
        place = next((i for i, part in enumerate(parts) if FOLDERS.fullmatch(part)), None)
        key = "/".join(parts[: place + 1]) if place is not None else folder
        found.setdefault(key, []).extend(rows)
    return found


def _by_folder(source: Source, folders: dict[str, list[int]]) -> list[MaskLike]:
    if len(folders) < 2:
        return []
    named = [folder for folder in folders if FOLDERS.fullmatch(folder.rsplit("/", 1)[-1])]
    few = {folder: _are_few(source, folders[folder]) for folder in (*named, *_mirrored(source, folders))}
    if not any(few.values()):
        return []
    others = [folder for folder in folders if not few.get(folder)]
    rest = [row for folder in others for row in folders[folder]]
    if not rest or _are_few(source, rest):  # all images have few colours
        return []
    image = os.path.commonpath(others) if all(others) else ""
    return [
        MaskLike(f"{folder}/", len(folders[folder]), image, f"{folder}/*") for folder, found in few.items() if found
    ]


def _mirrored(source: Source, folders: dict[str, list[int]]) -> list[str]:
    """Return the folders whose file names, without extension, mostly (MIRRORED) occur in another folder too."""
    if len(folders) > MOST_FOLDERS or len(source) > MOST_NAMES:
        return []
    stems = {folder: {_stem(source.names[row]) for row in rows} for folder, rows in folders.items()}
    holders = Counter(name for names in stems.values() for name in names)
    return [
        folder for folder, names in stems.items() if sum(holders[name] > 1 for name in names) >= MIRRORED * len(names)
    ]


def _by_ending(source: Source, folders: dict[str, list[int]]) -> list[MaskLike]:
    """Return groups of masks beside their images, such as a.jpg and a_mask.png."""
    if len(source) > MOST_NAMES:
        return []
    found: dict[str, list[int]] = {}
    for rows in folders.values():
        stems = {_stem(source.names[row]) for row in rows}
        for row in rows:
            stem = _stem(source.names[row])
            ending = ENDINGS.search(stem)
            if ending is not None and stem[: ending.start()] in stems:
                found.setdefault(ending[0] + os.path.splitext(source.names[row])[1], []).append(row)
    masks = {ending: rows for ending, rows in found.items() if _are_few(source, rows)}
    taken = {row for rows in masks.values() for row in rows}
    rest = [row for row in range(len(source)) if row not in taken] if masks else []
    if not rest or _are_few(source, rest):
        return []
    return [MaskLike(f"*{ending}", len(rows), "", f"*{ending}") for ending, rows in masks.items()]


def _stem(name: str) -> str:
    return os.path.splitext(name.rsplit("/", 1)[-1])[0]


def _are_few(source: Source, rows: Sequence[int]) -> bool:
    """Return whether nearly all images of a sample have few colours."""
    seen: list[bool] = []
    for row in _evenly(rows):
        if (few := _holds_few(source, row)) is not None:
            seen.append(few)
        if seen.count(False) > 1:  # two images with many colours are enough to decide
            return False
    return bool(seen) and sum(seen) >= 0.8 * len(seen)


def _evenly(rows: Sequence[int]) -> list[int]:
    return [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)))})]


def _holds_few(source: Source, row: int) -> bool | None:
    """Return whether an image has few colours: False for any JPEG, None for unreadable and very small images."""
    try:
        data = source.read(row)
        head = decode.header(data)
        if head.format == "JPEG":
            return False
        pixels = decode.decode(data, found=head)
    except (BadImage, MemoryError):
        return None
    step = max(1, int((pixels.shape[0] * pixels.shape[1] / 250_000) ** 0.5))
    flat = pixels[::step, ::step].reshape(-1, pixels.shape[2])
    if len(flat) < LEAST_PIXELS:
        return None
    return len(np.unique(flat, axis=0)) <= FEW


def mask_warnings(source: Source) -> list[str]:
    """Return a warning, with the fix, for each group of images that look like masks of the other images."""
    warnings = []
    for one in mask_like(source):
        inside = f"use only {source.name.rstrip('/')}/{one.images}, or " if one.images else ""
        warnings.append(
            f"{one.count} of {len(source)} images, {one.where}, look like segmentation masks of the others (few "
            f"colours, the same names), and would be used for training; {inside}leave them out with --exclude "
            f"'{one.pattern}'"
        )
    return warnings


@dataclass(frozen=True)
class Constant:
    """Images whose pixels all have the same value. alike: whether all these images have the same value (all black)."""

    count: int
    alike: bool
    names: tuple[str, ...]


def constant_images(source: Source, records: FileRecords) -> Constant | None:
    """Return the constant images, judging by the sums that the scan stored, or None if there are none."""
    if not len(records):
        return None
    pixels = np.repeat(np.maximum(1, records.valid).astype(np.float64), records.channels)
    mean = records.sums / pixels
    flat = np.abs(records.squares / pixels - mean**2) <= ROUNDING * mean**2
    places = np.flatnonzero(np.logical_and.reduceat(flat, records.starts) & (records.valid > 0))
    if not len(places):
        return None
    ends = records.starts + records.channels
    values = {tuple(mean[records.starts[place] : ends[place]]) for place in places}
    return Constant(
        len(places), len(values) == 1, tuple(source.names[row] for row in records.rows[places[:5]].tolist())
    )


def constant_line(found: Constant, good: int) -> str:
    """Return a warning about constant images."""
    if found.count == good:
        same = "the same in all images (all black, for example)" if found.alike else "but not the same in all images"
        return (
            f"in each of the {good} images, all pixels have the same value, {same}: they contain no information; check "
            "how they were written or read"
        )
    return (
        f"in {found.count} of {good} images, all pixels have the same value (all black, for example): "
        f"{listed(found.names, 3)}"
    )
