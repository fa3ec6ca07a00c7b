"""Find the columns of a parquet file that contain images, labels and names.

Images are the bytes of image files as any binary type or as lists of uint8, or structs with such a field `bytes`
(Hugging Face). Labels are text, whole numbers or booleans; for integers with names in Hugging Face's metadata
(ClassLabel), the names are used. Label columns of other kinds (lists, fractions, structs) are not used: the images then
have no labels, and `Labels.why` states the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmask.data.annotations.class_names import class_name, class_order
from unmask.errors import SourceError, listed

IMAGES = ("image", "img", "bytes", "jpg", "png")
LABELS = ("label", "labels", "class", "target")
NAMES = ("path", "file", "filename", "file_name", "name")
METADATA = b"huggingface"


class ColumnError(SourceError):
    """Raised for a parquet file whose columns cannot be used; the message names the column and the fix."""


@dataclass(frozen=True)
class Labels:
    """The labels of a parquet file.

    classes: class names, in order. numbers: (n,) int64, the class of each row, or None without labels. why: why a label
    column was not used.
    """

    classes: list[str] = field(default_factory=list)
    numbers: np.ndarray | None = None
    why: str = ""


def image_column(schema: Any, text: str) -> str:
    """Return the name of the image column.

    Raises ColumnError, with the type of each candidate, if there is no image column.
    """
    found = [one.name for one in schema if _holds_files(one.type)]
    for name in (*IMAGES, *found):
        if name in found:
            return name
    reasons = [why for one in schema if (why := _no_image(one.name, one.type))]
    raise ColumnError(
        f"{text} has no column of image bytes, only {', '.join(schema.names)}"
        + (f" ({'; '.join(reasons)})" if reasons else "")
        + "; store the bytes of image files in a binary column named image"
    )


def _holds_files(kind: Any) -> bool:
    """Return whether a column of this type can contain the bytes of files."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return "bytes" in fields and (_holds_files(fields["bytes"]) or pa.types.is_null(fields["bytes"]))
    if pa.types.is_dictionary(kind):
        return _holds_files(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return kind.value_type in (pa.uint8(), pa.int8())
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    view = getattr(pa.types, "is_binary_view", lambda _: False)
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or view(kind)
    )


def _no_image(name: str, kind: Any) -> str:
    """Return why a column that is named or nested like an image column is not one, or "" for other columns."""
    import pyarrow as pa

    if name.lower() not in IMAGES and not pa.types.is_nested(kind):
        return ""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"{name} has {kind}, pixel values rather than the bytes of files (PNG, JPEG)"
    if is_text(kind):
        return f"{name} has text, perhaps paths or base64, rather than bytes"
    return f"{name} has {kind}"


def image_bytes(value: Any) -> bytes:
    """Return the bytes of one image file from a pyarrow scalar; b"" for an empty row."""
    import pyarrow as pa

    if not value.is_valid:
        return b""
    if isinstance(value, pa.DictionaryScalar):
        return image_bytes(value.value)
    if isinstance(value, pa.StructScalar):
        return image_bytes(value["bytes"])
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        # Avoid Python ints, which would need 200 MB for a photograph.
        return b"" if value.values.null_count else value.values.to_numpy().astype(np.uint8).tobytes()
    return bytes(value.as_py())


def parquet_labels(file: Any, schema: Any, text: str) -> Labels:
    """Return the labels of a `ParquetFile`, from its first column in LABELS. Raises ColumnError for empty cells."""
    name = next((name for name in LABELS if name in schema.names), None)
    if name is None:
        return Labels()
    kind = schema.field(name).type
    if why := _no_class(kind):
        return Labels(why=f"the column {name} of {text} has {why}")
    values = file.read([name]).column(name).to_pylist()
    if None in values:
        raise ColumnError(
            f"{text} has no {name} in {values.count(None)} of {len(values)} rows, for example in row "
            f"{values.index(None)}; fill in every row, or remove the column"
        )
    if any(isinstance(value, float) for value in values):
        if broken := [value for value in values if not float(value).is_integer()]:
            return Labels(
                why=f"the column {name} of {text} has fractions such as {listed(map(str, dict.fromkeys(broken)), 3)}, "
                "which are quantities rather than classes; use them with `unmask probe --targets`"
            )
        values = [int(value) for value in values]
    names = class_label_names(schema, name)
    if names and all(type(value) is int for value in values):
        return _by_metadata(values, names, name, text)
    return _by_text([_as_text(value) for value in values])


def _by_text(texts: list[str]) -> Labels:
    known = {text: class_name(text) for text in dict.fromkeys(texts)}
    classes = class_order(known.values())
    place = {name: i for i, name in enumerate(classes)}
    return Labels(classes, np.array([place[known[text]] for text in texts], np.int64))


def _by_metadata(values: list[int], names: list[str], column: str, text: str) -> Labels:
    """Return labels with the class names of the file's metadata, in which -1 means "not labelled" (Hugging Face)."""
    if -1 in values:
        count = values.count(-1)
        return Labels(why=f"the column {column} of {text} has -1 (no label) in {count} of {len(values)} rows")
    if wrong := [value for value in values if not 0 <= value < len(names)]:
        raise ColumnError(
            f"{text} has the {column} {wrong[0]}; expected 0 to {len(names) - 1}, because its metadata name "
            f"{len(names)} classes: write the file again with correct metadata, or without"
        )
    there = sorted(set(values))
    classes = [class_name(names[value]) for value in there]
    if len(set(classes)) < len(classes):
        raise ColumnError(f"{text} has two classes with the same name in its metadata; give each its own name")
    place = {value: i for i, value in enumerate(there)}
    return Labels(classes, np.array([place[value] for value in values], np.int64))


def class_label_names(schema: Any, column: str) -> list[str]:
    """Return the class names of a column from the metadata of Hugging Face's `datasets`, or []."""
    try:
        read = json.loads((schema.metadata or {})[METADATA])
        features = read["info"]["features"] if "info" in read else read["features"]
        names = features[column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _no_class(kind: Any) -> str:
    """Return why values of a type cannot be classes, or "" if they can; floats can, because they may be whole."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _no_class(kind.value_type)
    if (
        pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
        or is_text(kind) or _is_bytes(kind)
    ):  # fmt: skip
        return ""
    if pa.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]:
        return "images (perhaps masks) rather than classes"
    if pa.types.is_nested(kind):
        return (
            f"{kind}, several values per row rather than one class; use multi-label targets with `unmask probe "
            "--targets`"
        )
    return f"{kind}, which cannot be a class; write it as text or whole numbers"


def is_text(kind: Any) -> bool:
    """Return whether a column of this type holds text."""
    import pyarrow as pa

    view = getattr(pa.types, "is_string_view", lambda _: False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or view(kind)


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
