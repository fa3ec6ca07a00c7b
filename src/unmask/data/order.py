"""The order of samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unmask.rng import permutation


@dataclass(frozen=True)
class SampleIndices:
    """The images of one batch: rows of the source, and how often each has been drawn before, its epoch."""

    index: np.ndarray  # (B,) int64
    epoch: np.ndarray  # (B,) int64


@dataclass
class Order:
    """Which image sample number s is. `rows` are the usable rows of the source; see the module for `repeats`."""

    rows: np.ndarray
    seed: int
    repeats: int = 1
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, start: int, count: int) -> SampleIndices:
        """Samples start .. start + count."""
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
