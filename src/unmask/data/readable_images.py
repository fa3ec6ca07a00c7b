"""An image reader for evaluation that leaves unreadable files out of their batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unmask.data.decode.bad_image import BadImage
from unmask.data.image_reader import ImageReader, LoadedBatch
from unmask.data.order import SampleIndices


@dataclass
class ReadableImages(ImageReader):
    """Leave unreadable files out of their batch, where `ImageReader` raises BadImage.

    A batch without readable files is empty.
    """

    def __getitem__(self, taken: SampleIndices) -> LoadedBatch:
        try:
            return super().__getitem__(taken)
        except BadImage:
            readable = np.array([self.fault(int(row)) is None for row in taken.index])
            return super().__getitem__(SampleIndices(taken.index[readable], taken.epoch[readable]))

    def fault(self, row: int) -> BadImage | None:
        """Return the error of an unreadable image, or None for a readable one."""
        try:
            super().__getitem__(SampleIndices(np.array([row]), np.zeros(1, np.int64)))
        except BadImage as error:
            return BadImage(error.code, error.detail.removeprefix(f"{self.source.names[row]}: "))
        return None
