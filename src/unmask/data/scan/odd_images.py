"""Find images that are probably no training images: segmentation masks among photographs, and images of one value.

Masks are in a folder with a typical name or with the names of another folder's images, or beside their image with a
suffix such as _mask, and hold few colours where the images hold many. A sample of each folder is decoded.
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
from unmask.errors import some

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
SAMPLE = 6  # images of each group that are decoded
FEW, LEAST_PIXELS = 40, 400  # most colours of a mask, and fewest pixels of an image that is examined
MOST_FOLDERS, MOST_NAMES = 64, 200_000  # names are not compared beyond these
ROUNDING = 1e-10  # relative error of the sums of a float image of one value
MIRRORED = 0.5  # share of a folder's names that occur in another folder too


@dataclass(frozen=True)
class MaskLike:
    """A group of images that look like segmentation masks.

    where: their folder or suffix. count: their number. images: the folder of the others. pattern: for --exclude.
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
    """Return rows by the part of the path that distinguishes masks from images, such as labels of labels/train."""
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
    told = [folder for folder in folders if FOLDERS.fullmatch(folder.rsplit("/", 1)[-1])]
    few = {folder: _are_few(source, folders[folder]) for folder in (*told, *_mirrored(source, folders))}
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
    """Return folders of which MIRRORED of the names, without extension, occur in another folder too."""
    if len(folders) > MOST_FOLDERS or len(source) > MOST_NAMES:
        return []
    stems = {folder: {_stem(source.names[row]) for row in rows} for folder, rows in folders.items()}
    holders = Counter(name for names in stems.values() for name in names)
    return [
        folder for folder, names in stems.items() if sum(holders[name] > 1 for name in names) >= MIRRORED * len(names)
    ]


def _by_ending(source: Source, folders: dict[str, list[int]]) -> list[MaskLike]:
    """Return masks beside their images, such as a.jpg and a_mask.png."""
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
    """Return whether nearly all of a sample of images hold few colours."""
    seen: list[bool] = []
    for row in _evenly(rows):
        if (few := _holds_few(source, row)) is not None:
            seen.append(few)
        if seen.count(False) > 1:  # two photographs are enough to decide
            return False
    return bool(seen) and sum(seen) >= 0.8 * len(seen)


def _evenly(rows: Sequence[int]) -> list[int]:
    return [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)))})]


def _holds_few(source: Source, row: int) -> bool | None:
    """Return whether an image holds few colours; False for JPEG, None for unreadable files and for few pixels."""
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
    """Return a sentence with the fix for each group of images that look like masks of the others."""
    said = []
    for one in mask_like(source):
        inside = f"give {source.name.rstrip('/')}/{one.images} alone, or " if one.images else ""
        said.append(
            f"{one.count} of {len(source)} images, {one.where}, look like segmentation masks of the others (few "
            f"colours, the same names): training would use them as images; {inside}leave them out with --exclude "
            f"'{one.pattern}'"
        )
    return said


@dataclass(frozen=True)
class Constant:
    """Images whose pixels all have one value. alike: whether it is the same value in all of them (all black)."""

    count: int
    alike: bool
    names: tuple[str, ...]


def constant_images(source: Source, looks: FileRecords) -> Constant | None:
    """Return the images of one value, by the sums of the scan; None without any."""
    if not len(looks):
        return None
    pixels = np.repeat(np.maximum(1, looks.valid).astype(np.float64), looks.channels)
    mean = looks.sums / pixels
    flat = np.abs(looks.squares / pixels - mean**2) <= ROUNDING * mean**2
    places = np.flatnonzero(np.logical_and.reduceat(flat, looks.starts) & (looks.valid > 0))
    if not len(places):
        return None
    ends = looks.starts + looks.channels
    values = {tuple(mean[looks.starts[place] : ends[place]]) for place in places}
    return Constant(len(places), len(values) == 1, tuple(source.names[row] for row in looks.rows[places[:5]].tolist()))


def constant_line(found: Constant, good: int) -> str:
    """Return a sentence on what images of one value mean for training."""
    if found.count == good:
        same = "all alike (black, for example)" if found.alike else "each of one value"
        return (
            f"every one of the {good} images holds a single value in all its pixels, {same}: they contain no "
            "information; check how they were written or read"
        )
    return (
        f"{found.count} of {good} images hold a single value in all their pixels (all black, for example): "
        f"{some(found.names, 3)}"
    )
