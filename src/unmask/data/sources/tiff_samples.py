"""Read every page of the TIFFs of a source as a separate image (`data.pages=samples`)."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from functools import partial

import numpy as np

from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.reading import Reading
from unmask.data.decode.tiff_pages import TIFF_STARTS, TooManyEntries, image_pages, read_pages, starting_at
from unmask.data.sources.source import Source


class TiffPagesSource(Source):
    """The rows of another source, with one row for each page of a TIFF; names get the suffixes #1 to #n.

    Levels of pyramids and masks do not count as pages. Every TIFF is read once to count its pages.

    offsets_of: for each row of the other source, the offsets of its pages, see `page_offsets`.
    """

    def __init__(self, of: Source, offsets_of: Iterable[list[int]]) -> None:
        names: list[str] = []
        rows: list[int] = []
        offsets: list[int] = []
        for row, (name, pages) in enumerate(zip(of.names, offsets_of, strict=True)):
            names += [f"{name}#{number}" for number in range(1, len(pages) + 1)] if len(pages) > 1 else [name]
            rows += [row] * len(pages)
            offsets += pages
        self.of, self.rows, self.offsets = of, np.array(rows, np.int64), np.array(offsets, np.int64)
        super().__init__(of.name, names, of.sizes[self.rows], location=of.location)
        self.reading = of.reading
        self.opened = of.opened
        self.data, self.exclude, self.excluded = of.data, of.exclude, of.excluded
        self.changed = None if of.changed is None else of.changed[self.rows]
        self.modified = None if of.modified is None else of.modified[self.rows]
        self.skipped = Counter(of.skipped)
        self.labels = None if of.labels is None else of.labels[self.rows]
        self.classes, self.split_folders, self.unlabelled = of.classes, of.split_folders, of.unlabelled

    def read(self, i: int) -> bytes:
        data, offset = self.of.read(int(self.rows[i])), int(self.offsets[i])
        return starting_at(data, offset) if offset else data

    def path(self, i: int) -> str | None:
        return self.of.path(int(self.rows[i]))

    def fingerprint(self) -> str:
        return self.of.fingerprint()


def apply_reading(source: Source, reading: Reading, offsets_of: Iterable[list[int]] | None = None) -> Source:
    """Return the source with its files decoded by `reading`; for data.pages=samples, with a row for every page.

    offsets_of: the offsets of the pages of each row (None: they are read).
    """
    if reading.pages == "samples":
        source = TiffPagesSource(
            source, map(partial(page_offsets, source), range(len(source))) if offsets_of is None else offsets_of
        )
    return source.with_reading(reading)


def page_offsets(source: Source, row: int) -> list[int]:
    """Return the offsets of a TIFF's page directories; [0] for other files and for files that cannot be read."""
    if not source.names[row].lower().endswith((".tif", ".tiff")):
        return [0]
    try:
        data = source.read(row)
        if data.startswith(TIFF_STARTS):
            return [page.offset for page in image_pages(read_pages(data))]
    except (BadImage, struct.error, OverflowError, TooManyEntries):
        pass
    return [0]
