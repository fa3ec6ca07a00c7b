"""Find the files of box annotations and pair them with images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from unmask.data.annotations.box_objects import BoxError, Objects
from unmask.data.files.text_files import TextError, read_text
from unmask.data.sources.source import Source
from unmask.errors import listed

VOC_IMAGES, VOC_BOXES, VOC_SPLITS = "JPEGImages", "Annotations", os.path.join("ImageSets", "Main")
COCO_IMAGES = "images"
COCO_FOLDERS, COCO_BESIDE = ("", "annotations", COCO_IMAGES), ("", "annotations")


def find_files(root: Path, annotations: Path | None) -> tuple[Path, Path]:
    """Return the folder of images, and the COCO file or the folder of VOC files.

    Raises BoxError if there are no annotations or several JSON files.
    """
    if annotations is not None:
        if not annotations.exists():
            raise BoxError(f"annotations {annotations} do not exist; expected a COCO .json or a folder of VOC .xml")
        inside = root / VOC_IMAGES
        return inside if inside.is_dir() else root, annotations
    if (root / VOC_IMAGES).is_dir() and (root / VOC_BOXES).is_dir():
        return root / VOC_IMAGES, root / VOC_BOXES
    found = [file for folder in COCO_FOLDERS for file in sorted((root / folder).glob("*.json"))]
    if not found and root.name == COCO_IMAGES:
        found = [file for folder in COCO_BESIDE for file in sorted((root.parent / folder).glob("*.json"))]
    if len(found) > 1:
        raise BoxError(
            f"found {len(found)} JSON files for {root}: {listed([str(file) for file in found])}; expected one: select "
            "one with --annotations"
        )
    if found:
        return root, found[0]
    if root.is_dir() and next(root.rglob("*.xml"), None) is not None:
        return root, root
    raise BoxError(
        f"found no boxes for {root}; expected {root / VOC_BOXES} beside {root / VOC_IMAGES}, an .xml beside each "
        f"image, or one COCO .json in {root} or its folder annotations, or a file or folder named with --annotations"
    )


def read_split(file: Path) -> set[str]:
    """Return the names without extension (first word of each line) of a list in ImageSets/Main. Raises BoxError."""
    try:
        words = [line.split() for line in read_text(file).splitlines()]
    except TextError as error:
        raise BoxError(f"the split list cannot be read: {error}") from None
    except OSError:
        there = sorted(path.stem for path in file.parent.glob("*.txt")) if file.parent.is_dir() else []
        raise BoxError(
            f"the split list {file} does not exist or cannot be read; "
            + (f"choose one of {', '.join(there)}" if there else "expected a text file with one image name per line")
        ) from None
    # In the split lists of single classes, -1 marks images without the class.
    return {line[0] for line in words if line and line[1:] != ["-1"]}


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def stem_name(path: str) -> str:
    """Return the file name of a path, without folders and extension."""
    return _stem(path).rsplit("/", 1)[-1]


def pair(source: Source, objects: Mapping[str, Objects], where: Path) -> tuple[dict[int, str], list[str]]:
    """Pair annotations with images by path, or else by file name.

    Returns the key in `objects` for each row of the source, and the keys without an image. Raises BoxError.
    """
    by_path = {_stem(name): row for row, name in enumerate(source.names)}
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(source.names):
        by_name.setdefault(stem_name(name), []).append(row)
    rows: dict[int, str] = {}
    missing: list[str] = []
    for key in objects:
        row = by_path.get(_stem(key))
        if row is None:
            alike = by_name.get(stem_name(key), [])
            if len(alike) > 1:
                could = listed((source.names[one] for one in alike), between=" or ")
                raise BoxError(
                    f"{key} of {where} matches several images, {could}; use the folder of one of them as DATA, or "
                    "write paths into the annotations"
                )
            row = alike[0] if alike else None
        if row is None:
            missing.append(key)
        elif row in rows:
            raise BoxError(
                f"{rows[row]} and {key} of {where} both annotate {source.names[row]}; expected one annotation for each "
                "image: delete one"
            )
        else:
            rows[row] = key
    if not rows:
        raise BoxError(
            f"none of {len(objects)} annotated images of {where} is in {source.name}: the annotations name "
            f"{listed(list(objects))}, but the images are {listed(source.names)}"
        )
    return dict(sorted(rows.items())), missing
