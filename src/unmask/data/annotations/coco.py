"""COCO's JSON for object detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.data.annotations.box_objects import BoxError, Found, Objects, four, refuse_fractions, shown, size_or_none
from unmask.data.annotations.class_names import class_name

EXPECTED = (
    "COCO's object detection was expected: {images: [{id, file_name}], categories: [{id, name}], annotations: "
    "[{image_id, category_id, bbox: [x, y, width, height]}]}"
)


def read_coco(file: Path) -> tuple[dict[str, Objects], list[str]]:
    """(objects by the image's file name, names of the categories in the order of their ids). Raises BoxError."""
    try:
        read = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BoxError(f"{file} cannot be read ({type(error).__name__}: {error}); {EXPECTED}") from None
    if not isinstance(read, dict):
        what = "a list, perhaps of predictions," if isinstance(read, list) else shown(read)
        raise BoxError(f"{file} holds {what} at the top; {EXPECTED}")
    images = _images(read, file)
    categories = _categories(read, file)
    found = {one: Found([], [], []) for one in images}
    for place, one in enumerate(_entries(read, "annotations", file)):
        where = f"annotations[{place}] of {file}"
        image, category = _id(one, "image_id", where), _id(one, "category_id", where)
        if image not in images or category not in categories:
            raise BoxError(
                f"{file} has an object of image {shown(image)}, category {shown(category)}, which it does not list "
                f"(annotations[{place}]); {EXPECTED}"
            )
        name = images[image][0]
        x, y, width, height = four(_value(one, "bbox", where), f"{where}, for {name},")
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
            raise BoxError(f"{where} has the file_name {shown(name)}; text was expected; {EXPECTED}")
        name = name.replace("\\", "/")
        if key in images:
            raise BoxError(f"{where} has the id {key!r}, as has {images[key][0]}; give each image an id of its own")
        if name in places:
            raise BoxError(
                f"{file} lists {name} more than once (images[{places[name]}] and images[{place}]); one entry for each "
                "image was expected"
            )
        places[name] = place
        images[key] = name, size_or_none(one.get("height"), one.get("width"))
    return images


def _categories(read: dict[str, Any], file: Path) -> dict[int | str, str]:
    """Names by id, in the order of the ids; two spellings of one name are one class."""
    raw: dict[int | str, str] = {}
    for place, one in enumerate(_entries(read, "categories", file)):
        where = f"categories[{place}] of {file}"
        key, name = _id(one, "id", where), _value(one, "name", where)
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise BoxError(f"{where} has the name {shown(name)}; text was expected; {EXPECTED}")
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
        raise BoxError(f"{part!r} of {file} is {shown(read[part])}; a list was expected; {EXPECTED}")
    for place, one in enumerate(read[part]):
        if not isinstance(one, dict):
            raise BoxError(f"{part}[{place}] of {file} is {shown(one)}; an object was expected; {EXPECTED}")
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
        raise BoxError(f"{where} has the {key} {shown(value)}; a number or text was expected")
    return value
