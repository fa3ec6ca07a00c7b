"""A parquet file of images; `parquet_columns.py` describes its columns."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from unmask.data import limits
from unmask.data.annotations.class_names import class_name
from unmask.data.decode.bad_image import BadImage
from unmask.data.sources.archives import times_of_archive
from unmask.data.sources.parquet_columns import (
    LABELS,
    NAMES,
    class_label_names,
    image_bytes,
    image_column,
    is_text,
    parquet_labels,
)
from unmask.data.sources.source import Opener, Source, printable
from unmask.errors import SourceError


class ParquetSource(Source):
    """A parquet file with a column of image bytes (or {bytes, path} structs), and optionally a label column."""

    def __init__(self, text: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(text) as file:
                schema = file.schema_arrow
                self.column = image_column(schema, text)
                self.struct = pa.types.is_struct(schema.field(self.column).type)
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                _refuse_large_groups(file, self.column, text)
                names = _parquet_names(file, schema, self.column, self.struct)
                label = next((name for name in LABELS if name in schema.names), None)
                class_list = [] if label is None else [class_name(n) for n in class_label_names(schema, label)]
                self.layout = (self.column, label, class_list)
                labels = parquet_labels(file, schema, text)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{text} cannot be read as a parquet file: {error}") from None
        self.starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        super().__init__(text, names, np.zeros(len(names), np.int64))
        self.changed, self.modified = times_of_archive(text, len(names))
        self.digest = hashlib.sha256(str((os.path.getsize(text), rows)).encode()).hexdigest()
        self.class_list = class_list
        self.classes, self.labels, self.unlabelled = labels.classes, labels.numbers, labels.why
        self.groups: dict[tuple[str, int], Any] = {}  # row groups in memory, least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"groups": {}}

    def fingerprint(self) -> str:
        return hashlib.sha256((super().fingerprint() + self.digest).encode()).hexdigest()

    def read(self, i: int) -> bytes:
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        # Rows are read in random order, but only whole groups can be read. Without a cache, a whole group would be read
        # for every image.
        held, key = self.groups, (self.location, group)
        column = held.pop(key) if key in held else self._read_group(group)
        held[key] = column
        while len(held) > 1 and sum(one.nbytes for one in held.values()) > limits.MAX_UNPACKED_BYTES:
            del held[next(iter(held))]
        value = image_bytes(column[i - int(self.starts[group])])
        if not value:
            raise BadImage("EMPTY", "the row has no image bytes")
        return value

    def _read_group(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.location) as file:
                return file.read_row_group(group, [self.column], use_threads=False).column(self.column)
        except (FileNotFoundError, PermissionError) as error:
            raise BadImage("VANISHED", f"the file can no longer be read: {error.strerror}") from None
        except (pa.ArrowException, OSError, IndexError) as error:
            raise BadImage("CORRUPT", f"row group {group} cannot be read: {error}") from None


def _refuse_large_groups(file: Any, column: str, text: str) -> None:
    """Raise SourceError for row groups above the memory limit, because groups can only be read as a whole."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = (group.column(index) for index in range(group.num_columns))
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column
        )
        if size > limits.MAX_UNPACKED_BYTES:
            raise SourceError(
                f"row group {number} of {text} has {size / 2**30:.1f} GiB of images in {group.num_rows} rows; expected "
                f"at most {limits.MAX_UNPACKED_BYTES / 2**30:.3g} GiB: write the file with smaller groups, for example "
                'with pyarrow.parquet.write_table(table, "smaller.parquet", row_group_size=1000)'
            )


def _parquet_names(file: Any, schema: Any, column: str, struct: bool) -> list[str]:
    for name in NAMES:
        if name in schema.names and name != column and is_text(schema.field(name).type):
            return [printable(str(value)) for value in file.read([name]).column(name).to_pylist()]
    if struct and "path" in [field.name for field in schema.field(column).type]:
        paths = [(value or {}).get("path") for value in file.read([f"{column}.path"]).column(column).to_pylist()]
        if all(paths):
            return [printable(str(path)) for path in paths]
    return [f"row-{row:08d}" for row in range(file.metadata.num_rows)]


OPENER = Opener("a .parquet file", lambda text: text.lower().endswith((".parquet", ".pq")), ParquetSource)
