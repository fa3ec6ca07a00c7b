"""Read, decode and crop images, and stack them into batches.

Segmentation masks and boxes (`Annotations`) are cropped and flipped with their image.

In training, a file that can no longer be read, or whose content changed since the source was opened (code CHANGED), is
replaced by another image and reported with the batch. The replacement is drawn from the counter-based generator, so it
is the same in every run.

Images cached in memory give the same pixels as images decoded again, except for JPEGs more than twice as large as their
crop needs: these are decoded at 1/2, 1/4 or 1/8 of their size unless cached, which changes pixels by a level or two.
Whether images are cached is part of a run's plan, so a resumed run gets the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import torch

from unmask.batch import IGNORED, Batch, ImageSpec
from unmask.data import augment
from unmask.data.augment import CropConfig
from unmask.data.decode import decode, nodata
from unmask.data.decode import pixels as pixels_module
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.image_header import Header
from unmask.data.order import SampleIndices
from unmask.data.scan.scan import BadFile
from unmask.data.sources.source import Source
from unmask.rng import Stream, uniform, words

REPLACEMENT_TRIES = 16
READ_AHEAD = 16  # maximum number of undecoded files in memory at a time


@dataclass(frozen=True)
class LoadedBatch:
    """A batch, and the unreadable files that were replaced in it."""

    batch: Batch
    bad: tuple[BadFile, ...] = ()

    def pin_memory(self) -> LoadedBatch:
        return LoadedBatch(self.batch.pin_memory(), self.bad)


@dataclass(frozen=True)
class OpenedImage:
    """One image between reading and cropping: its full size, and either its bytes and header, its pixels, or its error.

    size: (H, W) that boxes refer to; for a smaller copy (`pack.py`), the size of the original.
    valid: (H, W) bool, False for absent pixels, which hold the mean of the data set, or None if no pixel is absent.
    """

    size: tuple[int, int]
    data: bytes = b""
    header: Header | None = None
    image: np.ndarray | None = None
    fault: BadImage | None = None
    valid: np.ndarray | None = None


class Annotations(Protocol):
    """Annotations that are cropped and flipped with their image: segmentation masks or boxes. Picklable."""

    @property
    def rows(self) -> np.ndarray:
        """Rows of the source with annotations, sorted."""
        ...

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """Return the cropped annotations of one image, by `Batch` field; every image gives arrays of the same shapes.

        size: full size of the image, checked against that of the annotations. box, target, flip: as in `augment.cut`.
        Raises BadImage.
        """
        ...


@dataclass
class ImageReader:
    """Read, decode, crop and stack images on request. Picklable; everything random comes from `seed`.

    training: False crops the centred box without a flip, and raises BadImage for a bad file instead of replacing it.
    whole: whether evaluation uses the whole image, stretched to `spec.size`, so that every pixel is evaluated.
    repeats: number of consecutive training samples of the same image.
    on_device: whether `device_crops.to_device` resamples training images; only for 8-bit gray or RGB without jitter.
    annotations: masks or boxes of all `rows`.
    note: called with each row before it is read or decoded.
    min_valid: see `DataConfig`.
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
    kept: dict[int, OpenedImage] = field(default_factory=dict)
    gone_bad: set[str] = field(default_factory=set)
    note: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        bare = [] if self.annotations is None else np.setdiff1d(self.rows, self.annotations.rows)
        assert not len(bare), f"rows without annotations: {bare[:5]}"

    def __len__(self) -> int:
        return len(self.rows)

    def with_annotations(self, annotations: Annotations | None) -> Self:
        """Return a reader of the same images with these annotations; both share the images cached in memory."""
        return replace(self, annotations=annotations)

    @property
    def interpolation(self) -> str:
        """Interpolation of crops: as configured in training, bicubic in evaluation."""
        return self.crop.interpolation if self.training else "bicubic"

    def keep_decoded(self) -> None:
        """Decode every image at full size and cache it in memory; workers forked later share the cache.

        The cache takes memory for rows x H x W x C values of the data set's dtype. Images that cannot be decoded are
        reported when their batch is made.
        """
        for row in self.rows.tolist():
            try:
                data = self.source.read_unchanged(row)
                header = decode.header(data, self.source.reading)
                opened = OpenedImage(header.full_size, data, header)
                self.kept[row] = self._with_absent(opened, decode.decode(data, found=header))
            except BadImage:
                continue

    def __getitem__(self, taken: SampleIndices) -> LoadedBatch:
        index, bad, more = taken.index.copy(), [], []
        # Channels last, like decoded images and patch vectors: transposing a batch would take 5 % of the loading time.
        later = self.training and self.on_device
        size = augment.part_size(self.spec.size) if later else self.spec.size
        out = np.empty((len(index), *size, self.spec.channels), self.spec.dtype)
        crops = np.empty((len(index), 7), np.float32) if later else None
        for place, (image, box, flip) in enumerate(self._samples(taken)):
            row, crop = int(index[place]), None if crops is None else crops[place]
            try:
                beside = self._take(row, image, box=box, flip=flip, out=out[place], crop=crop)
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
                out[~valid] = self.fill  # colour jitter has changed absent pixels
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
        return LoadedBatch(batch, tuple(bad))

    def _all_valid(self, maps: list[np.ndarray | None]) -> np.ndarray | None:
        """Stack the (h, w) bool maps of single images into (B, h, w), or return None if no pixel is absent."""
        if all(valid is None or valid.all() for valid in maps):
            return None
        return np.stack([np.ones(self.spec.size, bool) if valid is None else valid for valid in maps])

    def _samples(self, taken: SampleIndices) -> Iterator[tuple[OpenedImage, np.ndarray, bool]]:
        """Yield the image, box and flip of each sample; `repeats` consecutive samples share one decoded image."""
        repeats = self.repeats if self.training else 1
        assert len(taken.index) % repeats == 0, f"{len(taken.index)} samples are not a multiple of {repeats} repeats"
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

    def opened(self, row: int) -> OpenedImage:
        """Read the bytes and the header of one image; an error is stored and raised when the image is cropped."""
        if self.note is not None:
            self.note(row)
        if row in self.kept:
            return self.kept[row]
        try:
            data = self.source.read_unchanged(row)
            header = decode.header(data, self.source.reading)
            return OpenedImage(header.full_size, data, header)
        except BadImage as error:
            return OpenedImage((1, 1), fault=error)

    def decoded(self, opened: OpenedImage, boxes: np.ndarray) -> OpenedImage:
        """Decode the image at the resolution that its boxes need, or store the error."""
        if opened.image is not None or opened.fault is not None:
            return opened
        sizes = [augment.decode_size(opened.size, box, self.spec.size) for box in boxes]
        try:
            at_least = (max(height for height, _ in sizes), max(width for _, width in sizes))
            return self._with_absent(opened, decode.decode(opened.data, at_least=at_least, found=opened.header))
        except BadImage as error:
            return OpenedImage(opened.size, fault=error)

    def _with_absent(self, opened: OpenedImage, pixels: np.ndarray) -> OpenedImage:
        """Convert the image to the dtype and channels of the data set, and find its absent pixels. Raises BadImage."""
        valid = nodata.valid_pixels(pixels, self.source.reading.nodata, nodata.declared(opened.data))
        if valid is None:
            return OpenedImage(opened.size, image=self._conform(pixels))
        image = self._conform(nodata.filled(pixels, valid))
        return OpenedImage(opened.size, image=nodata.filled(image, valid, self.fill), valid=valid)

    @property
    def fill(self) -> np.ndarray:
        """The value of absent pixels, (C,)."""
        return nodata.fill_values(self.spec.mean, self.spec.dtype)

    def _take(
        self, row: int, opened: OpenedImage, box: np.ndarray, flip: bool, out: np.ndarray, crop: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Write the crop of a decoded image to `out` (H, W, C); return its annotations and valid pixels.

        crop: (7,), the position of the crop's box in `out` for resampling on the device, or None to resample it here.
        Raises BadImage.
        """
        if opened.image is None:
            assert opened.fault is not None
            raise opened.fault
        y, x = (have / full for have, full in zip(opened.image.shape, opened.size, strict=False))
        box_here = box * (y, x, y, x)  # in pixels of the image as decoded
        beside = {}
        if self.annotations is not None:
            beside = self.annotations.cut(row, opened.size, box=box, target=self.spec.size, flip=flip)
        if opened.valid is not None:
            return beside | {"valid": self._take_valid(opened, box_here, flip=flip, out=out, crop=crop)}
        if crop is None:
            augment.cut(opened.image, box_here, self.spec.size, flip, out, self.interpolation)
        else:
            augment.cut_later(
                opened.image,
                box_here,
                target=self.spec.size,
                flip=flip,
                out=out,
                crop=crop,
                interpolation=self.interpolation,
            )
        return beside

    def _take_valid(
        self, opened: OpenedImage, box: np.ndarray, flip: bool, out: np.ndarray, crop: np.ndarray | None
    ) -> np.ndarray:
        """Resample the crop of an image with absent pixels on the CPU; return (h, w) bool, True for valid pixels."""
        assert opened.image is not None
        assert opened.valid is not None
        size = self.spec.size
        pixels, valid = augment.cut_valid(
            opened.image,
            opened.valid,
            fill=self.fill,
            box=box,
            target=size,
            flip=flip,
            interpolation=self.interpolation,
        )
        out[: size[0], : size[1]] = pixels
        if crop is not None:
            crop[:] = (0, 0, *size, *size, False)
        return valid

    def _conform(self, image: np.ndarray) -> np.ndarray:
        return pixels_module.conform(image, self.spec.channels, self.spec.dtype)

    def _replace(
        self, row: int, epoch: int, out: np.ndarray, crop: np.ndarray | None
    ) -> tuple[int, dict[str, np.ndarray]]:
        """Write a replacement for an unreadable image to `out`; the choice depends only on seed, epoch and row.

        Returns the row of the replacement, and its annotations and valid pixels. Raises BadImage if no replacement can
        be read.
        """
        one = np.array([row]), np.array([epoch])
        for word in words(self.seed, Stream.REPLACE, one[1], one[0], REPLACEMENT_TRIES)[0]:
            other = int(self.rows[word % len(self.rows)])
            opened = self.opened(other)
            boxes, flips = self._boxes(np.array([opened.size], np.int64), np.array([other]), one[1])
            try:
                return other, self._take(
                    other, self.decoded(opened, boxes), box=boxes[0], flip=bool(flips[0]), out=out, crop=crop
                )
            except BadImage:
                continue
        raise BadImage(
            "VANISHED",
            f"{self.source.names[row]} and {REPLACEMENT_TRIES} replacements cannot be read: the data set seems "
            "to be gone; restore it and resume",
        )

    def _boxes(self, sizes: np.ndarray, index: np.ndarray, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return crop boxes (B, 4) and flips (B,) for images of full `sizes` (B, 2); random in training."""
        if not self.training and self.whole:
            return augment.whole_boxes(sizes), np.zeros(len(index), bool)
        if not self.training:
            boxes = augment.center_boxes(sizes, self.spec.size, self.crop.eval_share)
            return boxes, np.zeros(len(index), bool)
        draws = uniform(self.seed, Stream.CROP, epoch, index, augment.CROP_DRAWS)
        flips = uniform(self.seed, Stream.FLIP, epoch, index, 1)[:, 0] < self.crop.flip
        return augment.crop_boxes(sizes, self.spec.size, self.crop, draws), flips
