"""Read boxes from COCO's JSON for object detection.

The file is untrusted: every entry is checked before it is used, and errors name the wrong entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unmask.data.annotations.box_objects import BoxError, Found, Objects, four, refuse_fractions, shown, size_or_none
from unmask.data.annotations.class_names import class_name

EXPECTED = (
    "expected COCO's object detection: {images: [{id, file_name}], categories: [{id, name}], annotations: "
    "[{image_id, category_id, bbox: [x, y, width, height]}]}"
)

Id = int | str


@dataclass(frozen=True)
class _Entry:
    """One JSON object of a list, and its position in the file for error messages."""

    fields: Mapping[str, object]
    where: str

    def value(self, key: str) -> object:
        """Return a field. Raises BoxError if the field is missing."""
        if key not in self.fields:
            raise BoxError(f"{self.where} has no {key!r}; {EXPECTED}")
        return self.fields[key]

    def id(self, key: str) -> Id:
        """Return the id stored in a field. Raises BoxError unless it is a whole number or text."""
        value = self.value(key)
        if isinstance(value, float) and value.is_integer():
            return int(value)  # some tools write all numbers as floats
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise BoxError(f"{self.where} has the {key} {shown(value)}; expected a number or text")
        return value


@dataclass(frozen=True)
class _Image:
    """File name of an image, and its size (H, W) or None."""

    file_name: str
    size: tuple[int, int] | None


def read_coco(file: Path) -> tuple[dict[str, Objects], list[str]]:
    """Return the objects by image file name, and the class names in the order of their ids. Raises BoxError."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BoxError(f"{file} cannot be read ({type(error).__name__}: {error}); {EXPECTED}") from None
    if not isinstance(content, dict):
        what = "a list, perhaps of predictions," if isinstance(content, list) else shown(content)
        raise BoxError(f"got {what} at the top level of {file}; {EXPECTED}")
    images = _images(content, file)
    categories = _categories(content, file)
    found = {key: Found([], [], []) for key in images}
    for place, entry in enumerate(_entries(content, "annotations", file)):
        image, category = entry.id("image_id"), entry.id("category_id")
        if image not in images or category not in categories:
            raise BoxError(
                f"annotations[{place}] of {file} has image_id {shown(image)} and category_id {shown(category)}, at "
                f"least one of which the file does not define; {EXPECTED}"
            )
        x, y, width, height = four(entry.value("bbox"), f"{entry.where}, for {images[image].file_name},")
        found[image].boxes.append((x, y, x + width, y + height))
        found[image].names.append(categories[category])
        found[image].aside.append(bool(entry.fields.get("iscrowd")))
    objects = {image.file_name: found[key].objects(image.size) for key, image in images.items()}
    refuse_fractions(objects, file)
    return objects, list(dict.fromkeys(categories.values()))


def _images(content: Mapping[str, object], file: Path) -> dict[Id, _Image]:
    images: dict[Id, _Image] = {}
    places: dict[str, int] = {}
    for place, entry in enumerate(_entries(content, "images", file)):
        key, name = entry.id("id"), entry.value("file_name")
        if not isinstance(name, str) or not name:
            raise BoxError(f"{entry.where} has the file_name {shown(name)}; expected text; {EXPECTED}")
        name = name.replace("\\", "/")
        if key in images:
            raise BoxError(
                f"{entry.where} has the same id {key!r} as {images[key].file_name}; give each image its own id"
            )
        if name in places:
            raise BoxError(
                f"{file} lists {name} more than once (images[{places[name]}] and images[{place}]); expected one entry "
                "for each image"
            )
        places[name] = place
        images[key] = _Image(name, size_or_none(entry.fields.get("height"), entry.fields.get("width")))
    return images


def _categories(content: Mapping[str, object], file: Path) -> dict[Id, str]:
    """Return class names by id, in the order of the ids; two Unicode spellings of a name are the same class."""
    names: dict[Id, str] = {}
    for entry in _entries(content, "categories", file):
        key, name = entry.id("id"), entry.value("name")
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise BoxError(f"{entry.where} has the name {shown(name)}; expected text; {EXPECTED}")
        if key in names:
            raise BoxError(f"{entry.where} has the same id {key!r} as {names[key]!r}; give each category its own id")
        if str(name) in names.values():
            raise BoxError(f"{file} has two categories named {str(name)!r}; give each its own name")
        names[key] = str(name)
    if len({type(key) for key in names}) > 1:
        raise BoxError(f"categories of {file} have both numbers and text as ids; use only one of the two")
    return {key: class_name(names[key]) for key in sorted(names, key=lambda key: (str(type(key)), key))}


def _entries(content: Mapping[str, object], part: str, file: Path) -> list[_Entry]:
    if part not in content:
        raise BoxError(f"{file} has no {part!r}; {EXPECTED}")
    entries = content[part]
    if not isinstance(entries, list):
        raise BoxError(f"{part!r} of {file} is {shown(entries)}; expected a list; {EXPECTED}")
    for place, fields in enumerate(entries):
        if not isinstance(fields, dict):
            raise BoxError(f"{part}[{place}] of {file} is {shown(fields)}; expected a JSON object; {EXPECTED}")
    return [_Entry(fields, f"{part}[{place}] of {file}") for place, fields in enumerate(entries)]
