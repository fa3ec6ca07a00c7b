"""The order of samples: which image is sample number s. Position is one integer, the number of samples consumed.

Sample number s belongs to pass s // n over the n images, at place s % n of that pass's order; order, crop, flip and
colour jitter are pure functions of (seed, epoch, image). Passes follow one another without a gap, so no image is left
out, and a batch may be larger than the data set.

With `repeats` R every image gives R samples in a row, each with its own crop, flip, jitter and mask, for one reading
and decoding (Hoffer et al. 2020, "Augment your batch"). The `epoch` of a sample counts how often its image was drawn
before: without repeats the number of the pass, with them R * pass + repeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unmask.rng import permutation


@dataclass(frozen=True)
class SampleIndices:
    """The samples of one batch: rows of the source, and the epoch of each (how often its image was drawn before)."""

    index: np.ndarray  # (B,) int64
    epoch: np.ndarray  # (B,) int64


@dataclass
class Order:
    """Maps sample numbers to images. rows: the usable rows of the source. repeats: see the module docstring."""

    rows: np.ndarray
    seed: int
    repeats: int = 1
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, start: int, count: int) -> SampleIndices:
        """Return samples start .. start + count."""
        slots, repeat = np.divmod(np.arange(start, start + count, dtype=np.int64), self.repeats)
        passes, place = np.divmod(slots, len(self.rows))
        index = np.empty_like(slots)
        for number in np.unique(passes):
            index[passes == number] = self._pass(int(number))[place[passes == number]]
        return SampleIndices(index, passes * self.repeats + repeat)

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._cache:
            self._cache = {n: order for n, order in self._cache.items() if n >= number - 1}
            self._cache[number] = self.rows[permutation(self.seed, number, len(self.rows))]
        return self._cache[number]
