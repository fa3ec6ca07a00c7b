"""Files of boxes: COCO's JSON for object detection, and Pascal VOC's XML, one file for each image.

Read as outside input: every entry is checked before it is used, and what is wrong is reported with the entry it stands
in. VOC files are decoded by the encoding they declare, whatever Expat knows. Names of classes are compared in Unicode's
composed form (`class_names.py`).

Not here: which images the boxes belong to, and whether they fit (`boxes.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from unmask.data.annotations.class_names import class_name
from unmask.data.files.text_files import TextError, decode_xml
from unmask.errors import UserError

EXPECTED = (
    "COCO's object detection was expected: {images: [{id, file_name}], categories: [{id, name}], annotations: "
    "[{image_id, category_id, bbox: [x, y, width, height]}]}"
)
FRACTIONS = 0.5  # share of the boxes from which on a file is taken to hold fractions
LONGEST_SHOWN = 60


class BoxError(UserError):
    """Annotations that cannot be used; the message says what came, what was expected, and what to do."""


class Objects(NamedTuple):
    """What the annotations say of one image: its size (H, W), or None; (n, 4) float64 boxes, n names; which are set
    aside, (n,) bool."""

    size: tuple[int, int] | None
    boxes: np.ndarray
    names: list[str]
    aside: np.ndarray


class _Found(NamedTuple):
    """The objects of one image while they are gathered."""

    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    aside: list[bool]

    def objects(self, size: tuple[int, int] | None) -> Objects:
        return Objects(size, _array(self.boxes), self.names, np.array(self.aside, bool))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def read_coco(file: Path) -> tuple[dict[str, Objects], list[str]]:
    """(objects by the image's file name, names of the categories in the order of their ids). Raises BoxError."""
    try:
        read = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BoxError(f"{file} cannot be read ({type(error).__name__}: {error}); {EXPECTED}") from None
    if not isinstance(read, dict):
        what = "a list, perhaps of predictions," if isinstance(read, list) else _shown(read)
        raise BoxError(f"{file} holds {what} at the top; {EXPECTED}")
    images = _images(read, file)
    categories = _categories(read, file)
    found = {one: _Found([], [], []) for one in images}
    for place, one in enumerate(_entries(read, "annotations", file)):
        where = f"annotations[{place}] of {file}"
        image, category = _id(one, "image_id", where), _id(one, "category_id", where)
        if image not in images or category not in categories:
            raise BoxError(
                f"{file} has an object of image {_shown(image)}, category {_shown(category)}, which it does not list "
                f"(annotations[{place}]); {EXPECTED}"
            )
        name = images[image][0]
        x, y, width, height = _four(_value(one, "bbox", where), f"{where}, for {name},")
        found[image].boxes.append((x, y, x + width, y + height))
        found[image].names.append(categories[category])
        found[image].aside.append(bool(one.get("iscrowd")))
    said = {name: found[key].objects(size) for key, (name, size) in images.items()}
    refuse_fractions(said, file)
    return said, list(dict.fromkeys(categories.values()))


def _images(read: dict[str, Any], file: Path) -> dict[int | str, tuple[str, tuple[int, int] | None]]:
    """(file name, size or None) by id."""
    images: dict[int | str, tuple[str, tuple[int, int] | None]] = {}
    places: dict[str, int] = {}
    for place, one in enumerate(_entries(read, "images", file)):
        where = f"images[{place}] of {file}"
        key, name = _id(one, "id", where), _value(one, "file_name", where)
        if not isinstance(name, str) or not name:
            raise BoxError(f"{where} has the file_name {_shown(name)}; text was expected; {EXPECTED}")
        name = name.replace("\\", "/")
        if key in images:
            raise BoxError(f"{where} has the id {key!r}, as has {images[key][0]}; give each image an id of its own")
        if name in places:
            raise BoxError(
                f"{file} lists {name} more than once (images[{places[name]}] and images[{place}]); one entry for each "
                "image was expected"
            )
        places[name] = place
        images[key] = name, _size(one.get("height"), one.get("width"))
    return images


def _categories(read: dict[str, Any], file: Path) -> dict[int | str, str]:
    """Names by id, in the order of the ids; two spellings of one name are one class."""
    raw: dict[int | str, str] = {}
    for place, one in enumerate(_entries(read, "categories", file)):
        where = f"categories[{place}] of {file}"
        key, name = _id(one, "id", where), _value(one, "name", where)
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise BoxError(f"{where} has the name {_shown(name)}; text was expected; {EXPECTED}")
        if key in raw:
            raise BoxError(f"{where} has the id {key!r}, as has {raw[key]!r}; give each category an id of its own")
        if str(name) in raw.values():
            raise BoxError(f"{file} has two categories of one name, {str(name)!r}; give each a name of its own")
        raw[key] = str(name)
    if len({type(key) for key in raw}) > 1:
        raise BoxError(f"categories of {file} have ids that are numbers and ids that are text; use one kind")
    return {key: class_name(raw[key]) for key in sorted(raw, key=lambda key: (str(type(key)), key))}


def _entries(read: dict[str, Any], part: str, file: Path) -> list[dict[str, Any]]:
    if part not in read:
        raise BoxError(f"{file} has no {part!r}; {EXPECTED}")
    if not isinstance(read[part], list):
        raise BoxError(f"{part!r} of {file} is {_shown(read[part])}; a list was expected; {EXPECTED}")
    for place, one in enumerate(read[part]):
        if not isinstance(one, dict):
            raise BoxError(f"{part}[{place}] of {file} is {_shown(one)}; an object was expected; {EXPECTED}")
    return read[part]


def _value(one: dict[str, Any], key: str, where: str) -> Any:
    if key not in one:
        raise BoxError(f"{where} has no {key!r}; {EXPECTED}")
    return one[key]


def _id(one: dict[str, Any], key: str, where: str) -> int | str:
    value = _value(one, key, where)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as tools that keep numbers as floats write it
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BoxError(f"{where} has the {key} {_shown(value)}; a number or text was expected")
    return value


def read_voc(folder: Path) -> tuple[dict[str, Objects], list[str]]:
    """(objects by the XML file's path in the folder, names of the classes in alphabetical order). Raises BoxError."""
    said: dict[str, Objects] = {}
    for file in sorted(folder.rglob("*.xml")):
        try:
            said[file.relative_to(folder).as_posix()] = _voc(_parse(file), file)
        except TextError as error:
            raise BoxError(str(error)) from None
        except (OSError, ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
            if isinstance(error, BoxError):
                raise
            raise BoxError(f"{file} cannot be read: {error}; an XML file of Pascal VOC was expected") from None
    if not said:
        raise BoxError(f"{folder} holds no .xml; a folder of Pascal VOC's XML was expected, a file for each image")
    refuse_fractions(said, folder, first=1)
    return said, sorted({name for one in said.values() for name in one.names})


def _parse(file: Path) -> ElementTree.Element:
    """The tree of an XML file. A document type is refused: its entities can make gigabytes of a few lines."""
    text = decode_xml(file.read_bytes(), file)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BoxError(f"{file} declares a document type or entities, which VOC's files have not; take them out")
    return ElementTree.fromstring(text)


def _voc(root: ElementTree.Element, file: Path) -> Objects:
    found = _Found([], [], [])
    for place, one in enumerate(root.iter("object"), 1):
        name = (one.findtext("name") or "").strip()
        corners = [one.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in corners:
            raise BoxError(
                f"{file} has an object without name or bndbox (object {place}); VOC's xmin, ymin, xmax, ymax were "
                "expected"
            )
        x1, y1, x2, y2 = _four(corners, f"object {place} of {file}")
        found.boxes.append((x1 - 1, y1 - 1, x2, y2))
        found.names.append(class_name(name))
        found.aside.append((one.findtext("difficult") or "0").strip() == "1")
    return found.objects(_size(root.findtext("size/height"), root.findtext("size/width")))


def refuse_fractions(said: dict[str, Objects], where: Path, *, first: int = 0) -> None:
    """Raise BoxError where boxes are fractions of the image's sides, as YOLO has them, instead of pixels.

    first: the number of the first pixel in the file, which was taken off x1 and y1.
    """
    boxes = np.concatenate([np.zeros((0, 4)), *(one.boxes for one in said.values())])
    boxes[:, :2] += first
    sides = boxes[:, 2:] - boxes[:, :2]
    small = (boxes[:, :2] <= 1).all(1) & (sides <= 1.0 + 1e-6).all(1) & (sides > 0).all(1)
    broken = small & (boxes != boxes.round()).any(1)
    if not len(boxes) or small.mean() < FRACTIONS or not broken.any():
        return
    name = next(key for key, one in said.items() if len(one.boxes) and (one.boxes[:, :2] + first <= 1).all(1).any())
    raise BoxError(
        f"{int(small.sum())} of {len(boxes)} boxes of {where} are fractions of their image's sides, for example in "
        f"{name}; pixels were expected: multiply x and width by the image's width, y and height by its height (YOLO's "
        "x and y are the middle of the box: subtract half of its width and height)"
    )


def _four(values: Any, where: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = map(float, values)
    except (TypeError, ValueError, OverflowError):
        a = b = c = d = math.nan
    if not all(map(math.isfinite, (a, b, c, d))) or isinstance(values, str | dict):
        raise BoxError(f"{where} has the box {_shown(values)}; four numbers were expected")
    return a, b, c, d


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """(H, W), or None where it is not said: some tools write nothing or zeros."""
    try:
        size = int(height), int(width)
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _array(boxes: Iterable[tuple[float, float, float, float]]) -> np.ndarray:
    return np.array(list(boxes), np.float64).reshape(-1, 4)


def corners_written_as_sizes(said: Iterable[tuple[Objects, tuple[int, int]]]) -> float:
    """Of COCO boxes that leave their image (H, W): the share that would fit if they were x1, y1, x2, y2."""
    leave = fit = 0
    for one, (height, width) in said:
        x, y, right, bottom = one.boxes.T
        outside = (right > width + 1) | (bottom > height + 1)
        x2, y2 = right - x, bottom - y
        leave += int(outside.sum())
        fit += int((outside & (x2 > x) & (y2 > y) & (x2 <= width + 1) & (y2 <= height + 1)).sum())
    return fit / leave if leave else 0.0
