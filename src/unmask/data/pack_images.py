"""Copy a data set into one tar in which large images are shrunk once, instead of in every epoch.

File names, their order, and the labels from folders stay
the same. Every smaller copy stores the size of its original (`image_header.packed_note`), and crop boxes are drawn in
pixels of the original. A run on the copy therefore has exactly the same order, crop boxes, flips and patch masks as a
run on the originals.

Four things differ. Pixels change, because images are resampled twice and JPEGs compressed twice. The scan's mean and
standard deviation change slightly. The fingerprint changes, so a run on the originals cannot be resumed on the copy,
nor the reverse. Crops that have fewer pixels in the copy than the method's image size lose detail.

JPEGs stay JPEGs. Other 8-bit and 16-bit gray or RGB images become PNG, and floats and other channel counts become .npy;
the file names do not change. Images that are small enough, would not become smaller files, or cannot be read are
copied byte for byte; training reports and skips unreadable ones as before.
"""

from __future__ import annotations

import glob
import io
import os
import struct
import tarfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

from unmask.console import Console
from unmask.data import augment
from unmask.data.decode import decode, nodata, png
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.choose_reading import choose_reading
from unmask.data.decode.image_header import Header, packed_note
from unmask.data.scan.scan import BadFile, num_cores
from unmask.data.sources.class_folders import classes_of
from unmask.data.sources.image_files import EXTENSIONS
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.data.sources.tar_file import TarSource
from unmask.errors import UserError, listed
from unmask.system.processes import process_pool

SHORT_SIDE = 512  # Pixels.
CHUNK = 8  # Images sent to a worker process at a time.
AHEAD = 4  # Maximum number of chunks per worker process that wait to be written.


class PackError(UserError):
    """Raised for images that cannot be packed, or a file that cannot be written."""


SHRUNK, SMALL, NO_SMALLER, BAD = "shrunk", "small enough", "cannot be made smaller", "bad"


@dataclass(frozen=True)
class Packed:
    """One image of the tar. what: SHRUNK, or why it was copied unchanged. fault: the error of a BAD image."""

    data: bytes
    what: str
    fault: BadImage | None = None


@dataclass(frozen=True)
class PackSummary:
    """Result of `pack`. copied_because: number of copied images by reason. bad: images that cannot be read."""

    data: str
    out: str
    short_side: int
    quality: int
    images: int
    shrunk: int
    copied_because: dict[str, int]
    bytes_before: int
    bytes_after: int
    bad: tuple[BadFile, ...]
    seconds: float = 0.0

    @property
    def copied(self) -> int:
        """Number of images copied byte for byte."""
        return sum(self.copied_because.values())

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "copied": self.copied}


def pack(
    data: str | Path,
    out: str | Path,
    *,
    short_side: int = SHORT_SIDE,
    quality: int = 90,
    workers: int | None = None,
    exclude: Sequence[str] = (),
    console: Console | None = None,
) -> PackSummary:
    """Write the images of `data` to the new file `out` (.tar) and return a summary.

    short_side: pixels to which longer short sides are shrunk; no image is enlarged. quality: JPEG quality, 1-100.
    workers: number of processes, None for one per core, 0 for this process. exclude: patterns of names to leave out.
    The file gets the name `out` only after it was completely written and read back. Raises PackError.
    """
    console, out, start = console or Console(), Path(out), time.monotonic()
    if short_side < 1 or not 1 <= quality <= 100:
        raise PackError(
            f"got short side {short_side} and quality {quality}; expected a short side of at least 1, and a quality "
            "from 1 to 100"
        )
    if out.suffix != ".tar":
        raise PackError(f"got {out}; expected the name of a new file that ends in .tar")
    if workers is not None and workers < 0:
        raise PackError(f"got {workers} workers; expected 0 (shrink the images in this process) or more")
    if out.exists():
        raise PackError(f"{out} already exists; choose another name, or delete it first")
    if left := [str(path) for path in out.parent.glob(f".{glob.escape(out.name)}.*.part")]:
        console.warn(f"found {listed(left)}: another pack is running, or one was killed; in that case delete it")
    source = open_source(data, exclude)
    require_packable(source)
    if workers is None:
        workers = num_cores()
    console.print(f"{source.name}: {len(source)} images found")
    reading, reasons = choose_reading(source, range(len(source)))
    source = source.with_reading(reading)
    for reason in reasons:
        console.print(f"  {reason}")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        written = _write(source, part, _packed(source, short_side, quality, workers), console)
        _require_same(source, part)
        if out.exists():
            raise PackError(f"{out} was created by another program in the meantime; choose another name")
        os.replace(part, out)
    except OSError as error:
        raise PackError(f"cannot write {out}: {error.strerror}; the incomplete file was deleted") from None
    except BrokenProcessPool:
        raise PackError(
            "a worker process was killed while it shrank images (out of memory, or a crash in a decoder); use fewer "
            "--workers, or --workers 0 to see the crash"
        ) from None
    finally:
        with suppress(OSError):
            part.unlink()
    summary = PackSummary(
        data=source.name,
        out=str(out),
        short_side=short_side,
        quality=quality,
        images=len(source),
        shrunk=written.kinds[SHRUNK],
        copied_because={what: count for what, count in sorted(written.kinds.items()) if what != SHRUNK},
        bytes_before=written.bytes_before,
        bytes_after=written.bytes_after,
        bad=tuple(written.bad),
        seconds=round(time.monotonic() - start, 1),
    )
    _print_summary(summary, console)
    return summary


def require_packable(source: Source) -> None:
    """Raise PackError unless a tar can store the names, their order and the labels."""
    names = list(source.names)
    folder = "use the folder, tar or zip that contains the files, or put the files of each class into one folder"
    if bare := [name for name in names if not name.lower().endswith(EXTENSIONS)]:
        raise PackError(f"the images of {source.name} have no file names (for example {bare[0]}); {folder}")
    if names != sorted(set(names)):
        raise PackError(
            f"{source.name} is not sorted by name, or contains a name twice, which a tar cannot store; {folder}"
        )
    labels = classes_of(names)[1]
    if source.labels is None and labels is not None:
        raise PackError(
            f"{source.name} has no labels, but its names contain folders, which would become classes in a tar; {folder}"
        )
    if source.labels is not None and (labels is None or not np.array_equal(labels, source.labels)):
        raise PackError(
            f"the labels of {source.name} are not its folder names, and a tar cannot store other labels; {folder}"
        )


@dataclass
class _Written:
    """Number of images by `Packed.what`, bytes of the files before and after, and unreadable images."""

    kinds: Counter[str] = field(default_factory=Counter)
    bytes_before: int = 0
    bytes_after: int = 0
    bad: list[BadFile] = field(default_factory=list)

    def add(self, name: str, size: int, image: Packed) -> None:
        self.kinds[image.what] += 1
        self.bytes_before += max(0, size)
        self.bytes_after += len(image.data)
        if image.fault is not None:
            self.bad.append(BadFile(name, image.fault.code, image.fault.detail))


def _write(source: Source, part: Path, images: Iterator[Packed], console: Console) -> _Written:
    """Write the tar and sync it to disk."""
    written = _Written()
    with open(part, "wb") as file, console.progress("packing", len(source)) as bar:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, size, image in zip(source.names, source.sizes.tolist(), images, strict=True):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(image.data), 0o644
                archive.addfile(member, io.BytesIO(image.data))
                written.add(name, size, image)
                share = written.bytes_after / max(1, written.bytes_before)
                bar.update(written.kinds.total(), f"shrunk to {share:.0%} of their bytes")
        file.flush()
        os.fsync(file.fileno())
    return written


def _require_same(source: Source, part: Path) -> None:
    """Read the written tar again. Raises PackError unless the tar has the names and labels of the source."""
    written = TarSource(str(part))
    same = list(written.names) == list(source.names)
    if not same or not np.array_equal(written.labels, source.labels):  # type: ignore[arg-type]
        raise PackError(
            f"the tar that was written differs from {source.name}: it has {len(written)} of {len(source)} images, or "
            "other names, for example because of hidden folders; rename those files and pack again"
        )


def _packed(source: Source, short_side: int, quality: int, workers: int) -> Iterator[Packed]:
    """Yield every image for the tar, in order."""
    if workers <= 0:
        yield from (pack_image(source, row, short_side, quality) for row in range(len(source)))
        return
    waiting: deque[Future[list[Packed]]] = deque()
    with process_pool(workers, _begin, (source, short_side, quality)) as pool:
        for start in range(0, len(source), CHUNK):
            waiting.append(pool.submit(_pack_many, range(start, min(start + CHUNK, len(source)))))
            if len(waiting) >= AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


_given: tuple[Source, int, int] | None = None  # arguments of a worker process, sent once


def _begin(source: Source, short_side: int, quality: int) -> None:
    global _given
    _given = source, short_side, quality


def _pack_many(rows: range) -> list[Packed]:
    assert _given is not None
    source, short_side, quality = _given
    return [pack_image(source, row, short_side, quality) for row in rows]


def pack_image(source: Source, row: int, short_side: int, quality: int) -> Packed:
    """Return one image for the tar, shrunk or copied. A file that cannot be opened is returned as BAD without bytes."""
    data = b""
    try:
        data = source.read(row)
        found = decode.header(data, source.reading)
        target = _target(found, short_side)
        # Decode at twice the target size, because scaled decoding filters less well than the bicubic interpolation
        # after it.
        at_least = None if target is None else (2 * target[0], 2 * target[1])
        pixels = decode.decode(data, at_least=at_least, found=found)
    except BadImage as error:
        return Packed(data, BAD, error)
    if target is None:
        return Packed(data, SMALL)
    box = np.array([0.0, 0.0, *pixels.shape[:2]])
    valid = nodata.valid_pixels(pixels, source.reading.nodata, nodata.declared(data))
    if valid is None:
        small = augment.cut(pixels, box, target, False)
    elif pixels.dtype == np.float32 and valid.any():
        fill = pixels[valid].mean(0)
        small, there = augment.cut_valid(
            nodata.filled(pixels, valid, fill), valid, fill=fill, box=box, target=target, flip=False
        )
        small[~there] = np.nan
    else:
        return Packed(data, NO_SMALLER)  # only a TIFF tag can mark absent integer pixels
    encoded = _encoded(small, found, quality)
    again = decode.header(encoded)  # a .npy with few rows and many channels would be read as (C, H, W)
    same = (again.height, again.width, again.channels, again.dtype) == (*small.shape, found.dtype)
    return Packed(encoded, SHRUNK) if same and len(encoded) < len(data) else Packed(data, NO_SMALLER)


def _target(found: Header, short_side: int) -> tuple[int, int] | None:
    """Return the size (H, W) to shrink to, or None for an image that is small enough."""
    short = min(found.height, found.width)
    if short <= short_side:
        return None
    return round(found.height * short_side / short), round(found.width * short_side / short)


def _encoded(pixels: np.ndarray, found: Header, quality: int) -> bytes:
    """Encode a smaller copy (H, W, C) of an image with this header."""
    note = packed_note((pixels.shape[0], pixels.shape[1]), found.full_size)
    if found.format == "JPEG":
        return _jpeg(pixels, quality, note)
    if pixels.shape[2] not in (1, 3) or pixels.dtype == np.float32:
        file = io.BytesIO()
        # Same order of axes as the original, so that shrunk and copied files agree.
        np.save(file, np.ascontiguousarray(pixels.transpose(2, 0, 1)) if found.layout.axes == "CHW" else pixels)
        return file.getvalue() + note  # other programs ignore bytes after the values of a .npy
    return _png(pixels, note) if pixels.dtype == np.uint8 else _png16(pixels, note)


def _jpeg(pixels: np.ndarray, quality: int, note: bytes) -> bytes:
    kind = "GRAY" if pixels.shape[2] == 1 else "RGB"
    data = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace=kind, colorsubsampling="420")
    place = 4 + int.from_bytes(data[4:6], "big")  # insert the note after the JFIF segment, which must be the first
    comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
    return data[:place] + comment + data[place:]


def _png(pixels: np.ndarray, note: bytes) -> bytes:
    info = PngImagePlugin.PngInfo()
    keyword, _, text = note.partition(b"\0")
    info.add_text(keyword.decode(), text.decode())
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _png16(pixels: np.ndarray, note: bytes) -> bytes:
    """Encode 16-bit gray or RGB (H, W, C) as PNG, each row as its difference from the one above.

    Pillow writes 16-bit images only in gray. imagecodecs also writes colour, with the same file size and speed (1.44 MB
    and 0.8 s for 512 x 640 pixels, November 2026), but cannot add the text chunk with the original's size.
    """
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # Differences modulo 256.
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows], 1)  # PNG filter type 2, "Up".
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)),
        (b"tEXt", note),
        (b"IDAT", zlib.compress(filtered.tobytes())),
        (b"IEND", b""),
    )
    return png.PNG_START + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _print_summary(summary: PackSummary, console: Console) -> None:
    because = "; ".join(f"{count} {what}" for what, count in summary.copied_because.items())
    console.print(
        f"{summary.out}: {summary.shrunk} images shrunk to a short side of {summary.short_side} pixels, "
        f"{summary.copied} copied unchanged{f' ({because})' if because else ''}; "
        f"{summary.bytes_before / 2**20:.1f} MiB became {summary.bytes_after / 2**20:.1f} MiB"
    )
    if summary.bad:
        named = listed([f"{one.name} ({one.code}: {one.detail})" for one in summary.bad])
        console.warn(
            f"{len(summary.bad)} images cannot be read and were copied unchanged; training skips them: {named}"
        )
