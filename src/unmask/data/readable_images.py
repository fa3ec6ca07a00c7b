"""Images of which the unreadable files are left out of their batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unmask.data.decode.bad_image import BadImage
from unmask.data.image_reader import ImageReader, LoadedBatch
from unmask.data.order import SampleIndices


@dataclass
class ReadableImages(ImageReader):
    """Images of an evaluation: a file that cannot be read is left out of its batch, where `ImageReader` raises.

    A batch of such files alone is empty.
    """

    def __getitem__(self, taken: SampleIndices) -> LoadedBatch:
        try:
            return super().__getitem__(taken)
        except BadImage:
            sound = np.array([self.fault(int(row)) is None for row in taken.index])
            return super().__getitem__(SampleIndices(taken.index[sound], taken.epoch[sound]))

    def fault(self, row: int) -> BadImage | None:
        """Return why one image cannot be read; None where it can."""
        try:
            super().__getitem__(SampleIndices(np.array([row]), np.zeros(1, np.int64)))
        except BadImage as error:
            return BadImage(error.code, error.detail.removeprefix(f"{self.source.names[row]}: "))
        return None
