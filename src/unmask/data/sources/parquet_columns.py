"""Find the columns of a parquet file that hold images, labels and names.

Images: bytes of files, plain, as views, in a dictionary, of fixed size or as lists of uint8, or structs that hold them
as `bytes` (Hugging Face). Labels: texts, whole numbers or booleans; integers that Hugging Face's metadata give names
(ClassLabel) are read by those. A label column of another kind (lists, fractions, structs) makes no class of each text:
the images then have no labels, and `Labels.why` says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmask.data.annotations.class_names import class_name, class_order
from unmask.errors import SourceError, some

IMAGES = ("image", "img", "bytes", "jpg", "png")
LABELS = ("label", "labels", "class", "target")
NAMES = ("path", "file", "filename", "file_name", "name")
METADATA = b"huggingface"


class ColumnError(SourceError):
    """A parquet file whose columns cannot be used; the message names the column and the fix."""


@dataclass(frozen=True)
class Labels:
    """`classes` in order and `numbers` (n,) int64 of each row; or None, and `why` a column was not taken for labels."""

    classes: list[str] = field(default_factory=list)
    numbers: np.ndarray | None = None
    why: str = ""


def image_column(schema: Any, text: str) -> str:
    """Return the name of the image column. Raises ColumnError with the type of each candidate."""
    found = [one.name for one in schema if _holds_files(one.type)]
    for name in (*IMAGES, *found):
        if name in found:
            return name
    reasons = [why for one in schema if (why := _no_image(one.name, one.type))]
    raise ColumnError(
        f"{text} has no column of image bytes; its columns are {', '.join(schema.names)}"
        + (f": {'; '.join(reasons)}" if reasons else "")
        + "; store the bytes of image files in a binary column called image"
    )


def _holds_files(kind: Any) -> bool:
    """Return whether a column of this type can hold the bytes of files."""
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
    """Return why a column with the name of an image column is not one; "" for others."""
    import pyarrow as pa

    if name.lower() not in IMAGES and not pa.types.is_nested(kind):
        return ""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"{name} holds {kind}, pixel values rather than the bytes of files (PNG, JPEG)"
    if is_text(kind):
        return f"{name} holds text, paths or base64 rather than bytes"
    return f"{name} holds {kind}"


def image_bytes(value: Any) -> bytes:
    """Return the bytes of one file from a pyarrow scalar of an image column; b"" for an empty row."""
    import pyarrow as pa

    if not value.is_valid:
        return b""
    if isinstance(value, pa.DictionaryScalar):
        return image_bytes(value.value)
    if isinstance(value, pa.StructScalar):
        return image_bytes(value["bytes"])
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        # not through Python ints, which take 200 MB for a photograph
        return b"" if value.values.null_count else value.values.to_numpy().astype(np.uint8).tobytes()
    return bytes(value.as_py())


def parquet_labels(file: Any, schema: Any, text: str) -> Labels:
    """Return the labels of a `ParquetFile`, from its first column in LABELS. Raises ColumnError for empty cells."""
    name = next((name for name in LABELS if name in schema.names), None)
    if name is None:
        return Labels()
    kind = schema.field(name).type
    if why := _no_class(kind):
        return Labels(why=f"the column {name} of {text} holds {why}")
    values = file.read([name]).column(name).to_pylist()
    if None in values:
        raise ColumnError(
            f"{text} has no {name} in {values.count(None)} of {len(values)} rows, for example in row "
            f"{values.index(None)}; give every row one, or leave the column out"
        )
    if any(isinstance(value, float) for value in values):
        if broken := [value for value in values if not float(value).is_integer()]:
            return Labels(
                why=f"the column {name} of {text} holds fractions such as {some(map(str, dict.fromkeys(broken)), 3)}, "
                "quantities rather than classes: give them to `unmask probe --targets`"
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
    """By the names in the file's metadata, in their order; -1 is Hugging Face's word for "not labelled"."""
    if -1 in values:
        count = values.count(-1)
        return Labels(why=f"the column {column} of {text} holds -1, no label, in {count} of {len(values)} rows")
    if wrong := [value for value in values if not 0 <= value < len(names)]:
        raise ColumnError(
            f"{text} has the {column} {wrong[0]}, but its metadata name {len(names)} classes, 0 to {len(names) - 1}; "
            "write the file again with its metadata, or without"
        )
    there = sorted(set(values))
    classes = [class_name(names[value]) for value in there]
    if len(set(classes)) < len(classes):
        raise ColumnError(f"{text} names two classes alike in its metadata; give each a name of its own")
    place = {value: i for i, value in enumerate(there)}
    return Labels(classes, np.array([place[value] for value in values], np.int64))


def class_label_names(schema: Any, column: str) -> list[str]:
    """The class names that Hugging Face's `datasets` wrote into a schema's metadata for a column; [] for none."""
    try:
        read = json.loads((schema.metadata or {})[METADATA])
        features = read["info"]["features"] if "info" in read else read["features"]
        names = features[column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _no_class(kind: Any) -> str:
    """What a type holds that is no class, in words; "" for texts, whole numbers, booleans and floats (to be seen)."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _no_class(kind.value_type)
    if (
        pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
        or is_text(kind) or _is_bytes(kind)
    ):  # fmt: skip
        return ""
    if pa.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]:
        return "images (masks?) rather than classes"
    if pa.types.is_nested(kind):
        return (
            f"{kind}, several values a row rather than one class: give multi-label targets to `unmask probe --targets`"
        )
    return f"{kind}, which is no class: write it as text or whole numbers"


def is_text(kind: Any) -> bool:
    """Return whether a column of this type holds text."""
    import pyarrow as pa

    view = getattr(pa.types, "is_string_view", lambda _: False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or view(kind)


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
