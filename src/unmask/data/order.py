"""Map sample numbers to images. The position of a run is the number of samples consumed.

Of n images, sample number s is image s % n in the order of pass s // n. Order, crop, flip and colour jitter are pure
functions of (seed, epoch, image). A batch may extend into the next pass, so no image is left out, and a batch may be
larger than the data set.

With `repeats` R, each image is decoded once for R consecutive samples, each with its own crop, flip, jitter and patch
mask (Hoffer et al. 2020, "Augment your batch"). The `epoch` of a sample is the number of earlier samples of its image:
without repeats the number of the pass, with repeats R * pass + repeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unmask.rng import permutation


@dataclass(frozen=True)
class SampleIndices:
    """The samples of one batch: the row in the source and the epoch of each (see the module docstring)."""

    index: np.ndarray  # (B,) int64
    epoch: np.ndarray  # (B,) int64


def places(count: int, rank: int = 0, ranks: int = 1, repeats: int = 1) -> np.ndarray:
    """Return the places of one rank's samples within a micro-batch of `count` samples, ascending int64.

    Each rank takes an equal part, and all samples of an image are in the same part, so that it is decoded once. If the
    part can be halved, its second half mirrors the first: with place p a rank also takes place count - 1 - p, because
    `nn/mixing.py` mixes these two. Otherwise the part is one slice.
    """
    assert 0 <= rank < ranks, f"got rank {rank} of {ranks}"
    assert count % (ranks * repeats) == 0, (
        f"got a micro-batch of {count} samples; expected a multiple of {ranks} ranks x {repeats} repeats"
    )
    part = count // ranks
    if ranks == 1 or part % (2 * repeats):
        return np.arange(rank * part, (rank + 1) * part, dtype=np.int64)
    half = np.arange(rank * part // 2, (rank + 1) * part // 2, dtype=np.int64)
    return np.concatenate([half, count - 1 - half[::-1]])


@dataclass
class Order:
    """Map sample numbers to images. rows: the usable rows of the source. repeats: see the module docstring."""

    rows: np.ndarray
    seed: int
    repeats: int = 1
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, start: int, count: int) -> SampleIndices:
        """Return samples `start` to `start + count - 1`."""
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
