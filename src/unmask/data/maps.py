"""Masks for segmentation: beside each image a picture of the same size that holds the class of every pixel.

A mask is a gray or a palette image (PNG best) whose stored numbers are ids; its colours, if it has any, are of no
account. It belongs to the image of the same name, but for the ending, in the same sub-folder. Image and mask folders
are found by themselves as DATA/images and DATA/labels (or masks, annotations), and so are DATA = .../images/train and
.../labels/train; otherwise the mask folder is named.

`classes.txt`, beside the masks or in the folder above, names ids 0, 1, 2 ... one a line; without it they are called
after their number. Ids that are `ignored` are no class and nobody's mistake: IGNORED (255) always, and others that are
asked for. Classes are numbered in the order of the ids that remain.

Not here: what is learned from masks (`tasks/segment.py`) and how well (`evals/segmentation.py`).
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from unmask.batch import IGNORED
from unmask.console import Console
from unmask.data import augment, decode
from unmask.data.decode import BadImage
from unmask.data.sources import Source, open_source
from unmask.errors import UserError, some

IMAGE_FOLDER, MASK_FOLDERS = "images", ("labels", "masks", "annotations")
CLASSES_FILE = "classes.txt"
UNKNOWN = 254  # stands for an id that is neither a class nor ignored


class MaskError(UserError):
    """Masks that cannot be used; the message says what came, what was expected, and what to do."""


@dataclass
class Maps:
    """The images of `source` that have a mask, and those masks. Keeps the contract of `loader.Annotations`.

    `places`: the row in `masks` that belongs to a row of images. `ids`: what stands in the files for each class.
    `pixels` and `images`: of how many pixels, in how many masks, each id was found; empty where nobody looked.
    """

    source: Source
    masks: Source
    places: dict[int, int]
    classes: tuple[str, ...] = ()
    ignored: tuple[int, ...] = (IGNORED,)
    pixels: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """Rows of images that have a mask, sorted."""
        return np.array(sorted(self.places), np.int64)

    @property
    def without(self) -> list[str]:
        """Names of the images that have none."""
        return [name for row, name in enumerate(self.source.names) if row not in self.places]

    @property
    def ids(self) -> list[int]:
        return first_ids(len(self.classes), self.ignored)

    def read(self, row: int) -> np.ndarray:
        """(H, W) uint8, the class of each pixel of an image in full, IGNORED where none is judged. Raises BadImage."""
        name = self.masks.names[self.places[row]]
        try:
            found = self._numbers()[read_ids(self.masks.read_unchanged(self.places[row]))]
        except BadImage as error:
            raise BadImage(error.code, f"its mask {name}: {error.detail}") from None
        if (found == UNKNOWN).any():
            raise BadImage("CORRUPT", f"its mask {name} holds ids that are neither a class nor ignored")
        return found

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """`maps` of one image, (h, w) int64; see `loader.Annotations`."""
        found = self.read(row)
        if found.shape != tuple(size):
            raise BadImage("CORRUPT", f"its mask has {sides(found.shape)} pixels, the image {sides(size)}")
        return {"maps": augment.cut_map(found, box, target, flip).astype(np.int64)}

    def _numbers(self) -> np.ndarray:
        """(65536,) uint8: the class of each id that a file can hold."""
        table = np.full(1 << 16, UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORED
        table[self.ids] = np.arange(len(self.ids))
        return table

    def lines(self) -> list[str]:
        """What was found, for people: counts, then one line for each class with its share of all pixels."""
        total = max(1, sum(self.pixels.values()))
        said = [f"{len(self.places)} images with a mask, {len(self.classes)} classes"]
        if without := self.without:
            said.append(f"{len(without)} images without one are left out: {some(without)}")
        if left := len(self.masks) - len(set(self.places.values())):
            said.append(f"{left} masks belong to no image")
        if self.unreadable:
            said.append(
                f"{len(self.unreadable)} masks cannot be read, their images are left out: {some(self.unreadable)}"
            )
        ignored = ", ".join(f"id {one}" for one in self.ignored if self.pixels[one])
        if ignored:
            share = sum(self.pixels[one] for one in self.ignored) / total
            said.append(f"{share:.1%} of all pixels are not judged ({ignored})")
        if self.pixels and (
            absent := [n for n, one in zip(self.classes, self.ids, strict=True) if not self.pixels[one]]
        ):
            said.append(f"{len(absent)} class{'es' * (len(absent) != 1)} in no mask: {some(absent)}")
        for name, one in zip(self.classes, self.ids, strict=True):
            said.append(
                f"  id {one:3d}  {self.pixels[one] / total:6.2%} of pixels, in {self.images[one]} images  {name}"
            )
        return said


def first_ids(count: int, ignored: Sequence[int]) -> list[int]:
    """The lowest `count` ids that are not ignored: those of classes 0, 1, 2 ..."""
    ids: list[int] = []
    one = 0
    while len(ids) < count:
        if one not in ignored:
            ids.append(one)
        one += 1
    return ids


def sides(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


# ------------------------------------------------------------------------------------------------------------- opening


def open_maps(
    data: str | Path,
    masks: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    ignored: Sequence[int] = (),
    look: bool = True,
    console: Console | None = None,
) -> Maps:
    """The images of DATA and their masks; images without one are left out of `rows`.

    masks: their folder (or tar, or zip), None where DATA is laid out as the module says. classes: names in order, of a
    model that is asked about these images; None reads `classes.txt`, or numbers them. ignored: ids that are no class,
    beside IGNORED. look=False reads no mask now, and then `classes` are needed. Raises MaskError, SourceError.
    """
    images, folder, beside = find_folders(str(data), None if masks is None else str(masks))
    source, found = open_source(images), open_source(folder)
    no_class = tuple(sorted({IGNORED, *ignored}))
    if wrong := [one for one in no_class if not 0 <= one < 1 << 16]:
        raise MaskError(
            f"ignored id {wrong[0]} came; a number from 0 to 65535, as it stands in the masks, was expected"
        )
    maps = Maps(source, found, pair(source, found), ignored=no_class)
    if look:
        _look_at_all(maps, console or Console(quiet=True))
    names = named_in(beside) if classes is None else None
    if classes is not None:
        maps.classes = tuple(classes)
    elif names is not None:
        maps.classes = tuple(name for one, name in enumerate(names) if one not in no_class)
    else:
        assert look, "to number the classes the masks must be looked at"
        top = max((one for one in maps.pixels if one not in no_class), default=-1)
        maps.classes = tuple(f"class {one}" for one in range(top + 1) if one not in no_class)
    _require_sound(maps, training=classes is None)
    return maps


def find_folders(data: str, masks: str | None) -> tuple[str, str, list[Path]]:
    """(images, masks, folders in which `classes.txt` may lie). Raises MaskError where no masks are to be found."""
    root = Path(data)
    inside = root / IMAGE_FOLDER
    has_images = inside.is_dir()
    if masks is not None:
        if not os.path.exists(masks):
            raise MaskError(f"mask folder {masks} does not exist; a folder of masks named as their images was expected")
        return (
            str(inside) if has_images and Path(masks).parent == root else data,
            masks,
            [Path(masks), Path(masks).parent],
        )
    for name in MASK_FOLDERS:
        if has_images and (root / name).is_dir():
            return str(inside), str(root / name), [root / name, root]
    parts = root.absolute().parts
    for place in [i for i, part in enumerate(parts) if part == IMAGE_FOLDER][::-1]:
        for name in MASK_FOLDERS:
            other = Path(*parts[:place], name, *parts[place + 1 :])
            if other.is_dir():
                return data, str(other), [other, Path(*parts[:place], name), Path(*parts[:place])]
    raise MaskError(
        f"no masks were found for {data}; {data.rstrip('/')}/{IMAGE_FOLDER} beside {data.rstrip('/')}/"
        f"{{{','.join(MASK_FOLDERS)}}} was expected, or a folder named with --annotations"
    )


def pair(source: Source, masks: Source) -> dict[int, int]:
    """Row of images -> row of masks, by name without its ending. Raises MaskError."""
    stems: dict[str, int] = {}
    for place, name in enumerate(masks.names):
        stem = os.path.splitext(name)[0]
        if stem in stems:
            raise MaskError(
                f"masks {masks.names[stems[stem]]} and {name} of {masks.name} are both for the image {stem}; one mask "
                "for each image was expected: take one away"
            )
        stems[stem] = place
    own = [os.path.splitext(name)[0] for name in source.names]
    places = {row: stems[stem] for row, stem in enumerate(own) if stem in stems}
    if not places:
        raise MaskError(
            f"none of {len(source)} images of {source.name} has a mask in {masks.name}: {source.names[0]} needs "
            f"{own[0]}.png there, but {some(masks.names)} came; name masks as their images, in the same sub-folders"
        )
    return places


def named_in(folders: Sequence[Path]) -> list[str] | None:
    """The names in the first `classes.txt` of these folders, or None. Raises MaskError for one that cannot be used."""
    file = next((folder / CLASSES_FILE for folder in folders if (folder / CLASSES_FILE).is_file()), None)
    if file is None:
        return None
    try:
        names = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MaskError(
            f"{file} cannot be read ({type(error).__name__}); UTF-8 text, a name a line, was expected"
        ) from None
    while names and not names[-1]:
        names.pop()
    double = [name for name, count in Counter(names).items() if count > 1 or not name]
    if double or not names:
        what = f"the name {double[0]!r} more than once or empty" if double else "no name"
        raise MaskError(
            f"{file} holds {what}; a name for each of ids 0, 1, 2 ... was expected, one a line, all different"
        )
    return names


# ------------------------------------------------------------------------------------------------------------- reading


def read_ids(data: bytes, *, thorough: bool = False) -> np.ndarray:
    """(H, W) uint8 or uint16, the numbers that a mask holds: gray levels, or indices of a palette. Raises BadImage.

    thorough: find also such damage as Pillow alone does not notice, at twice the cost.
    """
    head = decode.header(data)
    if head.format == "JPEG":
        raise BadImage("UNSUPPORTED_MODE", "a JPEG, which does not keep ids as they are; save masks as PNG")
    if head.format == "NPY":
        raise BadImage("UNSUPPORTED_MODE", "a NumPy array; save masks as PNG")
    if thorough:
        decode.decode(data, found=head)
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage("CORRUPT", f"it cannot be decoded: {error}") from None
    if values.ndim != 2:
        raise BadImage(
            "UNSUPPORTED_MODE",
            f"a colour picture (mode {mode}); one number for each pixel was expected, a gray or palette PNG: turn each "
            "colour into the id of its class first",
        )
    if head.format == "PNG" and data[25] == 0 and data[24] in (2, 4):
        values = values // (255 // (2 ** data[24] - 1))  # gray of few bits, which Pillow stretches to 8
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 1 << 16:
        raise BadImage("UNSUPPORTED_MODE", f"{values.dtype} pixels; whole numbers from 0 to 65535 were expected")
    return values if values.dtype == np.uint8 else values.astype(np.uint16)


def _look_at_all(maps: Maps, console: Console) -> None:
    """Count the ids of every mask, and hold its size against the image's. Raises MaskError for what is no mask."""
    with console.progress("masks", len(maps.places)) as bar:
        for done, (row, place) in enumerate(sorted(maps.places.items()), 1):
            name = maps.masks.names[place]
            try:
                ids = read_ids(maps.masks.read(place), thorough=True)
            except BadImage as error:
                if error.code == "UNSUPPORTED_MODE":
                    raise MaskError(f"mask {name} of {maps.masks.name} is {error.detail}") from None
                maps.unreadable.append(f"{name} ({error})")
                del maps.places[row]
                continue
            _require_size(maps, row, ids.shape)
            counts = np.bincount(ids.ravel())
            present = counts.nonzero()[0].tolist()
            maps.images.update(present)
            maps.pixels.update({one: int(counts[one]) for one in present})
            bar.update(done)
    if not maps.places:
        raise MaskError(f"no mask of {maps.masks.name} can be read: {some(maps.unreadable)}; PNG files were expected")


def _require_size(maps: Maps, row: int, shape: tuple[int, ...]) -> None:
    try:
        head = decode.header(maps.source.read(row), maps.source.reading)
    except BadImage:  # for whoever scans the images to say
        return
    if shape != head.full_size:
        raise MaskError(
            f"mask {maps.masks.names[maps.places[row]]} has {sides(shape)} pixels, but its image "
            f"{maps.source.names[row]} is shown with {sides(head.full_size)}; masks of the images' own size "
            "were expected: resize them without interpolation (nearest)"
        )


def _require_sound(maps: Maps, *, training: bool) -> None:
    """Raises MaskError for too few or too many classes, and for ids that are none."""
    count = len(maps.classes)
    if count < 2:
        found = ", ".join(map(str, sorted(maps.pixels)))
        raise MaskError(
            f"the masks of {maps.masks.name} hold ids {found}, which leaves {count} class{'es' * (count != 1)}; at "
            f"least two were expected, numbered from 0 ({IGNORED} is never judged: a class needs another id)"
        )
    if len(there := [one for one in maps.ids if maps.pixels[one]]) == 1 and training:
        raise MaskError(
            f"the masks of {maps.masks.name} hold one class only, id {there[0]}, so there is nothing to tell apart; at "
            "least two were expected"
        )
    known = {*maps.ids, *maps.ignored}
    if strange := sorted(one for one in maps.pixels if one not in known):
        shown = some(str(one) for one in strange)
        raise MaskError(
            f"the masks of {maps.masks.name} hold id {shown} (in {maps.images[strange[0]]} of {len(maps.places)}), but "
            f"{count} classes are known, ids {maps.ids[0]} to {maps.ids[-1]}; name it in {CLASSES_FILE}, or ignore it "
            f"with --ignore {strange[0]}"
        )
    if count > UNKNOWN:
        raise MaskError(
            f"{count} classes came (the masks of {maps.masks.name} hold ids up to {max(maps.pixels, default=count)}), "
            f"at most {UNKNOWN} were expected; number classes from 0 without gaps"
        )
