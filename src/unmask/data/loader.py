"""From a source to batches. Position is one integer: how many samples have been taken.

Sample number s belongs to pass s // n over the n images, at place s % n of that pass's order; order, crop, flip and
colour jitter are pure functions of (seed, epoch, image). Workers are handed explicit lists of images and keep no state,
so their number cannot change what is drawn, and starting anywhere costs nothing: there is no iterator to wind forward.
Passes follow one another without a gap, so no image is left out and a batch may be larger than the data set.

With `repeats` R every image that a pass comes to gives R samples in a row, each with its own crop, flip, jitter and
mask, for one reading and decoding (Hoffer et al. 2020, "Augment your batch"). The `epoch` of a sample counts how often
its image has been drawn before, which without repeats is the number of the pass; with them it is R * pass + repeat.

Maps of classes and boxes around objects (`Annotations`) are cut by the very box and flip that cut their image.

A file that has gone bad since the scan is replaced by another image drawn from the same counter-based stream, so every
run replaces it alike; it is reported with the batch. So is a file whose content has changed since the source was opened
(code CHANGED): a run never trains on changed content unnoticed.

Images kept in memory give the same pixels as images decoded anew, but for one case: a JPEG more than twice as large as
its crop needs is, when it is not kept, decoded at 1/2, 1/4 or 1/8 before it is resampled, which differs by a level or
two. So what a run draws depends on whether it keeps its images; that is decided once and is part of its plan, and a
resumed run does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from unmask.batch import IGNORED, Batch, ImageSpec
from unmask.data import augment
from unmask.data.augment import CropConfig
from unmask.data.decode import decode, nodata
from unmask.data.decode.decode import BadImage, Header
from unmask.data.scan import BadFile, num_cores
from unmask.data.sources.open_source import Source
from unmask.data.worker_pool import WorkerPool
from unmask.rng import Stream, permutation, uniform, words

REPLACEMENT_TRIES = 16
READ_AHEAD = 16  # files of a batch that are held undecoded at a time


@dataclass(frozen=True)
class Taken:
    """The images of one batch: rows of the source, and how often each has been drawn before, its epoch."""

    index: np.ndarray  # (B,) int64
    epoch: np.ndarray  # (B,) int64


@dataclass(frozen=True)
class Delivery:
    """A batch, and the files that could not be read for it (each was replaced)."""

    batch: Batch
    bad: tuple[BadFile, ...] = ()

    def pin_memory(self) -> Delivery:
        return Delivery(self.batch.pin_memory(), self.bad)


@dataclass
class Order:
    """Which image sample number s is. `rows` are the usable rows of the source; see the module for `repeats`."""

    rows: np.ndarray
    seed: int
    repeats: int = 1
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, start: int, count: int) -> Taken:
        """Samples start .. start + count."""
        slots, repeat = np.divmod(np.arange(start, start + count, dtype=np.int64), self.repeats)
        passes, place = np.divmod(slots, len(self.rows))
        index = np.empty_like(slots)
        for number in np.unique(passes):
            index[passes == number] = self._pass(int(number))[place[passes == number]]
        return Taken(index, passes * self.repeats + repeat)

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._cache:
            self._cache = {n: order for n, order in self._cache.items() if n >= number - 1}
            self._cache[number] = self.rows[permutation(self.seed, number, len(self.rows))]
        return self._cache[number]


@dataclass(frozen=True)
class Opened:
    """One image on its way: its full size, and either its bytes and header, or itself decoded, or what is wrong.

    valid: (H, W) bool, False where a pixel is absent; None where all are there. Absent pixels hold the data's mean.
    The full size is the one its boxes are drawn in: that of the original where a smaller copy stands for it
    (data/pack.py).
    """

    size: tuple[int, int]
    data: bytes = b""
    header: Header | None = None
    image: np.ndarray | None = None
    fault: BadImage | None = None
    valid: np.ndarray | None = None


class Annotations(Protocol):
    """What belongs to the pixels of an image and is cropped and flipped with it. Picklable; see maps.py, boxes.py."""

    @property
    def rows(self) -> np.ndarray:
        """Those of the source that have any, sorted."""
        ...

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """Arrays of `Batch`'s fields for one image, always of the same shapes, from the arguments of `augment.cut`.

        size: that of the image in full, to hold against what was annotated. Raises BadImage.
        """
        ...


@dataclass
class Images:
    """Reads, decodes, crops and stacks the images it is asked for. Picklable; everything random comes from `seed`.

    training=False means the centred box and no flip; then a bad file raises, because an evaluation must not put
    another image in its place. whole=True: outside training the box is the whole image, squeezed or stretched to the
    size the method sees, so that every pixel is judged. repeats: samples in a row that are of one image, in training.
    on_device: training images are not resampled here but by `Batch.to`; 8-bit gray and RGB only, without jitter.
    With `annotations`, `rows` must be among theirs. note: called with each row before it is read or decoded. min_valid:
    see `DataConfig`.
    """

    source: Source
    rows: np.ndarray
    spec: ImageSpec
    crop: CropConfig
    seed: int = 0
    training: bool = True
    annotations: Annotations | None = None
    whole: bool = False
    repeats: int = 1
    on_device: bool = False
    min_valid: float = 0.5
    kept: dict[int, Opened] = field(default_factory=dict)
    gone_bad: set[str] = field(default_factory=set)
    note: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        bare = [] if self.annotations is None else np.setdiff1d(self.rows, self.annotations.rows)
        assert not len(bare), f"images without annotations are among the rows: {bare[:5]}"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def interpolation(self) -> str:
        """Of the crops: the setting in training, bicubic in evaluation."""
        return self.crop.interpolation if self.training else "bicubic"

    def keep_decoded(self) -> None:
        """Decode every image once, in full, and keep it, for sets that fit in memory; workers forked later share it.

        It takes rows x H x W x C values of the data set's dtype; the scan tells whether they fit. What cannot be
        decoded now is met again, and reported, when its turn comes.
        """
        for row in self.rows.tolist():
            try:
                data = self.source.read_unchanged(row)
                header = decode.header(data, self.source.reading)
                opened = Opened(header.full_size, data, header)
                self.kept[row] = self._with_absent(opened, decode.decode(data, found=header))
            except BadImage:
                continue

    def __getitem__(self, taken: Taken) -> Delivery:
        index, bad, more = taken.index.copy(), [], []
        # Channels last, as decoders write and as a patch vector is laid out: to turn each batch would cost a twentieth.
        later = self.training and self.on_device
        room = augment.room_for(self.spec.size) if later else self.spec.size
        out = np.empty((len(index), *room, self.spec.channels), self.spec.dtype)
        crops = np.empty((len(index), 7), np.float32) if later else None
        for place, (image, box, flip) in enumerate(self._samples(taken)):
            row, crop = int(index[place]), None if crops is None else crops[place]
            try:
                beside = self._take(row, image, box, flip, out[place], crop)
            except BadImage as error:
                bad.append(BadFile(self.source.names[row], error.code, error.detail))
                if not self.training:
                    raise BadImage(error.code, f"{bad[-1].name}: {error.detail}") from None
                index[place], beside = self._replace(row, int(taken.epoch[place]), out[place], crop)
            more.append(beside)
        if self.training and self.crop.jitter:
            draws = uniform(self.seed, Stream.JITTER, taken.epoch, index, 3)
            out = augment.jitter_colours(out, self.crop.jitter, draws)
        valid = self._all_valid([one.pop("valid", None) for one in more])
        if valid is not None:
            if crops is None:
                out[~valid] = self.fill  # as before the colours were changed
            for one, there in zip(more, valid, strict=True):
                if "maps" in one:
                    one["maps"] = np.where(there, one["maps"], IGNORED).astype(one["maps"].dtype)
        labels = self.source.labels
        batch = Batch(
            images=torch.from_numpy(out).permute(0, 3, 1, 2),
            index=torch.from_numpy(index),
            epoch=torch.from_numpy(taken.epoch.copy()),
            labels=None if labels is None else torch.from_numpy(labels[index]),
            crops=None if crops is None else torch.from_numpy(crops),
            size=self.spec.size if later else None,
            interpolation=self.interpolation,
            valid=None if valid is None else torch.from_numpy(valid),
            min_valid=self.min_valid,
            **{name: torch.from_numpy(np.stack([one[name] for one in more])) for name in (more[0] if more else ())},
        )
        return Delivery(batch, tuple(bad))

    def _all_valid(self, maps: list[np.ndarray | None]) -> np.ndarray | None:
        """(B, h, w) bool of the maps of single images; None where no pixel of any is absent."""
        if all(valid is None or valid.all() for valid in maps):
            return None
        return np.stack([np.ones(self.spec.size, bool) if valid is None else valid for valid in maps])

    def _samples(self, taken: Taken) -> Iterator[tuple[Opened, np.ndarray, bool]]:
        """Image, box and flip of each: `repeats` in a row are of one image, which is decoded once."""
        repeats = self.repeats if self.training else 1
        assert len(taken.index) % repeats == 0, f"{len(taken.index)} samples are not {repeats} of every image"
        for start in range(0, len(taken.index), READ_AHEAD * repeats):
            part = slice(start, start + READ_AHEAD * repeats)
            opened = [self.opened(row) for row in taken.index[part][::repeats].tolist()]
            sizes = np.array([image.size for image in opened], np.int64).repeat(repeats, 0)
            boxes, flips = self._boxes(sizes, taken.index[part], taken.epoch[part])
            for number, image in enumerate(opened):
                own = slice(number * repeats, (number + 1) * repeats)
                if self.note is not None:
                    self.note(int(taken.index[part][own][0]))
                image = self.decoded(image, boxes[own])
                yield from ((image, box, bool(flip)) for box, flip in zip(boxes[own], flips[own], strict=True))

    def opened(self, row: int) -> Opened:
        """The bytes and the size of one image; a fault is kept until its turn comes."""
        if self.note is not None:
            self.note(row)
        if row in self.kept:
            return self.kept[row]
        try:
            data = self.source.read_unchanged(row)
            header = decode.header(data, self.source.reading)
            return Opened(header.full_size, data, header)
        except BadImage as error:
            return Opened((1, 1), fault=error)

    def decoded(self, opened: Opened, boxes: np.ndarray) -> Opened:
        """The image as large as its boxes need it, or what is wrong with it."""
        if opened.image is not None or opened.fault is not None:
            return opened
        sizes = [augment.decode_size(opened.size, box, self.spec.size) for box in boxes]
        try:
            at_least = (max(height for height, _ in sizes), max(width for _, width in sizes))
            return self._with_absent(opened, decode.decode(opened.data, at_least=at_least, found=opened.header))
        except BadImage as error:
            return Opened(opened.size, fault=error)

    def _with_absent(self, opened: Opened, pixels: np.ndarray) -> Opened:
        """The image as the data set has it, and which of its pixels are absent. Raises BadImage."""
        valid = nodata.valid_pixels(pixels, self.source.reading.nodata, nodata.declared(opened.data))
        if valid is None:
            return Opened(opened.size, image=self._conform(pixels))
        image = self._conform(nodata.filled(pixels, valid))
        return Opened(opened.size, image=nodata.filled(image, valid, self.fill), valid=valid)

    @property
    def fill(self) -> np.ndarray:
        """(C,): what stands for an absent pixel."""
        return nodata.fill_values(self.spec.mean, self.spec.dtype)

    def _take(
        self, row: int, opened: Opened, box: np.ndarray, flip: bool, out: np.ndarray, crop: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Writes a decoded image's crop to `out` (H, W, C), or with `crop` (7,) what it is made of on the device.

        Returns what goes with it. Raises BadImage.
        """
        if opened.image is None:
            assert opened.fault is not None
            raise opened.fault
        y, x = (have / full for have, full in zip(opened.image.shape, opened.size, strict=False))
        box_here = box * (y, x, y, x)  # an image that is smaller than in full shrinks the box alike
        beside = {}
        if self.annotations is not None:
            beside = self.annotations.cut(row, opened.size, box, self.spec.size, flip)
        if opened.valid is not None:
            return beside | {"valid": self._take_valid(opened, box_here, flip, out, crop)}
        if crop is None:
            augment.cut(opened.image, box_here, self.spec.size, flip, out, self.interpolation)
        else:
            augment.cut_later(opened.image, box_here, self.spec.size, flip, out, crop, self.interpolation)
        return beside

    def _take_valid(
        self, opened: Opened, box: np.ndarray, flip: bool, out: np.ndarray, crop: np.ndarray | None
    ) -> np.ndarray:
        """As `_take`, for an image with absent pixels, which is resampled here; returns (h, w) bool."""
        assert opened.image is not None
        assert opened.valid is not None
        size = self.spec.size
        pixels, valid = augment.cut_valid(opened.image, opened.valid, self.fill, box, size, flip, self.interpolation)
        out[: size[0], : size[1]] = pixels
        if crop is not None:
            crop[:] = (0, 0, *size, *size, False)
        return valid

    def _conform(self, image: np.ndarray) -> np.ndarray:
        return decode.conform(image, self.spec.channels, self.spec.dtype)

    def _replace(
        self, row: int, epoch: int, out: np.ndarray, crop: np.ndarray | None
    ) -> tuple[int, dict[str, np.ndarray]]:
        """Writes the image that stands in for a bad one, the same choice in every run whatever came before, to `out`.

        Returns its row and what goes with it.
        """
        one = np.array([row]), np.array([epoch])
        for word in words(self.seed, Stream.REPLACE, one[1], one[0], REPLACEMENT_TRIES)[0]:
            other = int(self.rows[word % len(self.rows)])
            opened = self.opened(other)
            boxes, flips = self._boxes(np.array([opened.size], np.int64), np.array([other]), one[1])
            try:
                return other, self._take(other, self.decoded(opened, boxes), boxes[0], bool(flips[0]), out, crop)
            except BadImage:
                continue
        raise BadImage(
            "VANISHED",
            f"{self.source.names[row]} and {REPLACEMENT_TRIES} others drawn to replace it cannot be read: the data "
            "seem to have gone; bring them back and resume",
        )

    def _boxes(self, sizes: np.ndarray, index: np.ndarray, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 4) boxes and (B,) flips of images of these full sizes, (B, 2)."""
        if not self.training and self.whole:
            return augment.whole_boxes(sizes), np.zeros(len(index), bool)
        if not self.training:
            boxes = augment.center_boxes(sizes, self.spec.size, self.crop.eval_share)
            return boxes, np.zeros(len(index), bool)
        draws = uniform(self.seed, Stream.CROP, epoch, index, augment.CROP_DRAWS)
        flips = uniform(self.seed, Stream.FLIP, epoch, index, 1)[:, 0] < self.crop.flip
        return augment.crop_boxes(sizes, self.spec.size, self.crop, draws), flips


class Deliveries(Iterator[Delivery], Protocol):
    """Batches as they are needed; `close` ends the workers that make them."""

    def close(self) -> None: ...


@dataclass
class _Positions:
    """The requests of a training: the micro-batches from a position on."""

    order: Order
    start: int
    count: int
    batches: int

    def __iter__(self) -> Iterator[Taken]:
        for number in range(self.batches):
            yield self.order.take(self.start + number * self.count, self.count)


@dataclass
class _Batches:
    """What a worker process runs: one batch per request."""

    images: Images

    def make(self, request: Taken, note: Callable[[int], None]) -> Delivery:
        self.images.note = note
        return self.images[request]

    def name(self, row: int) -> str:
        return self.images.source.names[row]


def training_batches(
    images: Images, *, start: int, batch: int, batches: int, workers: int, pin: bool = False, folder: Path | None = None
) -> Deliveries:
    """`batches` deliveries of `batch` images from sample number `start` on, decoded by `workers` processes.

    The processes start now and end with the iterator. folder: see `WorkerPool`. Raises BadImage when a bad file cannot
    even be replaced, and LoadingFailed when a worker dies or stalls.
    """
    order = Order(images.rows, images.seed, images.repeats)
    return _deliveries(images, _Positions(order, start, batch, batches), workers, pin, folder)


def eval_batches(images: Images, rows: np.ndarray, *, batch: int, workers: int = 0) -> Iterator[Batch]:
    """The given rows in order, none of it random; the last batch may be smaller. Raises BadImage, LoadingFailed."""
    pieces = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    taken = [Taken(piece.astype(np.int64), np.zeros(len(piece), np.int64)) for piece in pieces]
    return (delivery.batch for delivery in _deliveries(images, taken, workers))


def _deliveries(
    images: Images, requests: Iterable[Taken], workers: int, pin: bool = False, folder: Path | None = None
) -> Deliveries:
    if workers:
        return WorkerPool(_Batches(images), requests, workers, caught=BadImage, pin=pin, folder=folder)
    made = (images[taken] for taken in requests)
    return (delivery.pin_memory() for delivery in made) if pin else made


def choose_workers(device: str, *, cached: bool) -> tuple[int, str]:
    """How many decoding processes, and the reason as a sentence."""
    cores = num_cores()
    if device == "cpu":
        if cached or cores < 2:
            return 0, "0 loader workers: the images are in memory and the processor is busy training" if cached else (
                "0 loader workers: one core"
            )
        return max(1, cores // 4), f"{max(1, cores // 4)} loader workers: a quarter of {cores} cores, the rest trains"
    workers = max(1, min(cores - 1, 12))
    return workers, f"{workers} loader workers: {cores} cores, less one for the main process"
