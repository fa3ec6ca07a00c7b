"""Read boxes from Pascal VOC's XML, one file for each image, in any encoding that the file declares."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from unmask.data.annotations.box_objects import BoxError, Found, Objects, four, refuse_fractions, size_or_none
from unmask.data.annotations.class_names import class_name
from unmask.data.files.text_files import TextError, decode_xml


def read_voc(folder: Path) -> tuple[dict[str, Objects], list[str]]:
    """Return the objects of each XML file, by its path in the folder, and the sorted class names. Raises BoxError."""
    objects: dict[str, Objects] = {}
    for file in sorted(folder.rglob("*.xml")):
        try:
            objects[file.relative_to(folder).as_posix()] = _voc(_parse(file), file)
        except TextError as error:
            raise BoxError(str(error)) from None
        except (OSError, ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
            if isinstance(error, BoxError):
                raise
            raise BoxError(f"{file} cannot be read: {error}; expected an XML file of Pascal VOC") from None
    if not objects:
        raise BoxError(f"{folder} has no .xml file; expected a folder of Pascal VOC's XML, one file for each image")
    refuse_fractions(objects, folder, first=1)
    return objects, sorted({name for one in objects.values() for name in one.names})


def _parse(file: Path) -> ElementTree.Element:
    """Parse an XML file. Raises BoxError for a DOCTYPE or entities, which could expand to gigabytes."""
    text = decode_xml(file.read_bytes(), file)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BoxError(f"{file} declares a document type or entities, which VOC's files do not use; remove them")
    return ElementTree.fromstring(text)


def _voc(root: ElementTree.Element, file: Path) -> Objects:
    found = Found([], [], [])
    for place, one in enumerate(root.iter("object"), 1):
        name = (one.findtext("name") or "").strip()
        corners = [one.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in corners:
            raise BoxError(
                f"{file} has an object without name or bndbox (object {place}); expected VOC's xmin, ymin, xmax, ymax"
            )
        x1, y1, x2, y2 = four(corners, f"object {place} of {file}")
        found.boxes.append((x1 - 1, y1 - 1, x2, y2))
        found.names.append(class_name(name))
        found.aside.append((one.findtext("difficult") or "0").strip() == "1")
    return found.objects(size_or_none(root.findtext("size/height"), root.findtext("size/width")))
