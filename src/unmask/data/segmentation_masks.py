"""Masks for segmentation: beside each image a picture of the same size that holds the class of every pixel.

A mask is a gray or a palette image (PNG best) whose stored numbers are ids; its colours, if it has any, are of no
account. It belongs to the image of the same name, but for the ending, in the same sub-folder. Image and mask folders
are found by themselves as DATA/images and DATA/labels (or masks, annotations), and so are DATA = .../images/train and
.../labels/train; otherwise the mask folder is named.

`classes.txt`, beside the masks or in the folder above, names ids 0, 1, 2 ... one a line; without it they are called
after their number, and other files that commonly name classes (`class_files.py`) are proposed. Pixels of `ignored` ids
are left out of loss and metrics: IGNORED (255) always, and others that are asked for. Classes are numbered in the order
of the ids that remain. `MaskOptions.values` lists the ids that are classes instead; then 255 may be one of them.

Masks of the stored pixels of images that carry an orientation are turned with them (`orientation.py`).

Not here: what is learned from masks (`tasks/segment.py`) and how well (`metrics/mean_iou.py`).
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
from unmask.data import augment, mask_advice
from unmask.data.class_files import find_class_files, read_class_file
from unmask.data.class_names import class_name
from unmask.data.decode import decode
from unmask.data.decode.decode import BadImage
from unmask.data.decode.orientation import Drawn, drawn_on
from unmask.data.sources.open_source import Source, open_source
from unmask.data.text_files import TextError, read_text
from unmask.errors import UserError, some

IMAGE_FOLDER, MASK_FOLDERS = "images", ("labels", "masks", "annotations")
CLASSES_FILE = "classes.txt"
UNKNOWN = 254  # stands for an id that is neither a class nor ignored


class MaskError(UserError):
    """Masks that cannot be used; the message says what came, what was expected, and what to do."""


@dataclass(frozen=True)
class MaskOptions:
    """How masks are read, beyond the ids that are ignored.

    values: the ids that are classes, in their order; () for all that are not ignored. names: a file that names them;
    None for `classes.txt`. stored: whether masks were drawn on the stored pixels of images that carry an orientation;
    None finds out.
    """

    values: tuple[int, ...] = ()
    names: Path | None = None
    stored: bool | None = None


@dataclass
class Maps:
    """The images of `source` that have a mask, and those masks. Keeps the contract of `loader.Annotations`.

    `places`: the row in `masks` that belongs to a row of images. `ids`: what stands in the files for each class.
    `pixels` and `images`: of how many pixels, in how many masks, each id was found; empty where nobody looked. `values`
    and `stored`: as in `MaskOptions`. `notes`: what looks wrong, with the option that settles it. `samples`: some
    masks, thinned out, and `sizes` (H, W) of all; empty where nobody looked.
    """

    source: Source
    masks: Source
    places: dict[int, int]
    classes: tuple[str, ...] = ()
    ignored: tuple[int, ...] = (IGNORED,)
    pixels: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    values: tuple[int, ...] = ()
    stored: bool = False
    notes: list[str] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

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
        return list(self.values) or first_ids(len(self.classes), self.ignored)

    def read(self, row: int) -> np.ndarray:
        """(H, W) uint8, the class of each pixel of an image in full, IGNORED where none is judged. Raises BadImage."""
        name = self.masks.names[self.places[row]]
        try:
            ids = read_ids(self.masks.read_unchanged(self.places[row]))
            found = self._numbers()[self._turned(row, ids)]
        except BadImage as error:
            raise BadImage(error.code, f"its mask {name}: {error.detail}") from None
        if (found == UNKNOWN).any():
            raise BadImage("CORRUPT", f"its mask {name} holds ids that are neither a class nor ignored")
        return found

    def _turned(self, row: int, ids: np.ndarray) -> np.ndarray:
        """A mask of stored pixels -> of the image as shown."""
        return decode.oriented(ids, decode.header(self.source.read(row)).orientation) if self.stored else ids

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
        return said + self.notes

    def size_line(self, size: tuple[int, int], patch: int) -> tuple[str, bool]:
        """What the size (h, w) that the model sees means for these masks, and whether it costs much."""
        own = tuple(int(side) for side in np.median(np.array(self.sizes), axis=0))
        found = [self._numbers()[ids] for ids in self.samples]
        return mask_advice.size_line(found, size, (own[0], own[1]), self.classes, patch)


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
    options: MaskOptions | None = None,
    look: bool = True,
    console: Console | None = None,
) -> Maps:
    """The images of DATA and their masks; images without one are left out of `rows`.

    masks: their folder (or tar, or zip), None where DATA is laid out as the module says. classes: names in order, of a
    model that is asked about these images; None reads `classes.txt`, or numbers them. ignored: ids that are no class,
    beside IGNORED. options: see `MaskOptions`. look=False reads no mask now, and then `classes` are needed.
    Raises MaskError, SourceError.
    """
    images, folder, beside = find_folders(str(data), None if masks is None else str(masks))
    source, found = open_source(images), open_source(folder)
    options = options or MaskOptions()
    _require_values(options.values, ignored)
    no_class = tuple(sorted({IGNORED, *ignored} - set(options.values)))
    if wrong := [one for one in no_class if not 0 <= one < 1 << 16]:
        raise MaskError(
            f"ignored id {wrong[0]} came; a number from 0 to 65535, as it stands in the masks, was expected"
        )
    maps = Maps(source, found, pair(source, found), ignored=no_class, values=options.values)
    if look:
        drawn = _look_at_all(maps, console or Console(quiet=True))
    else:
        drawn = {} if options.stored is not None else _look_at_headers(maps)
    maps.stored = options.stored if options.stored is not None else _drawn_on_stored(maps, drawn)
    if classes is not None:
        maps.classes = tuple(classes)
    else:
        assert look, "to number the classes the masks must be looked at"
        names = _names(beside, options, maps)
        _refuse_levels(maps, named=names is not None)
        maps.classes = _classes(maps, names)
        named = dict(enumerate(names or ())) if not maps.values else dict(zip(maps.values, maps.classes, strict=True))
        maps.notes += mask_advice.likely_void(maps.pixels, named if names else {}, maps.samples, no_class)
        if names is None:
            maps.notes += _proposed_names(beside, maps)
    _require_sound(maps, training=classes is None)
    return maps


def _require_values(values: Sequence[int], ignored: Sequence[int]) -> None:
    if wrong := [one for one in values if not 0 <= one < 1 << 16 or values.count(one) > 1 or one in ignored]:
        raise MaskError(
            f"got mask value {wrong[0]}; expected different ids from 0 to 65535, none of them with --ignore too"
        )
    if len(values) == 1:
        raise MaskError(f"got one mask value, {values[0]}; expected at least two, such as --mask-values 0,255")


def _names(beside: Sequence[Path], options: MaskOptions, maps: Maps) -> list[str] | None:
    """Names in the order of the ids (or of the values), from the file that was asked for, or `classes.txt`."""
    if options.names is None:
        return named_in(beside)
    found = read_class_file(options.names)
    if maps.values and not set(found) >= set(maps.values):
        return [found[one] for one in sorted(found)]
    if maps.values:
        return [found[one] for one in maps.values]
    return [found.get(one, f"class {one}") for one in range(max(found) + 1)]


def _classes(maps: Maps, names: Sequence[str] | None) -> tuple[str, ...]:
    if maps.values:
        if names is not None and len(names) != len(maps.values):
            raise MaskError(
                f"got {len(names)} class names for {len(maps.values)} mask values; give a name for each value, in "
                "the same order"
            )
        return tuple(names or (f"class {one}" for one in maps.values))
    if names is not None:
        return tuple(name for one, name in enumerate(names) if one not in maps.ignored)
    top = max((one for one in maps.pixels if one not in maps.ignored), default=-1)
    return tuple(f"class {one}" for one in range(top + 1) if one not in maps.ignored)


def _refuse_levels(maps: Maps, *, named: bool) -> None:
    """Raises MaskError for masks of gray levels, whose ids mean something else than they seem to; notes lesser doubts.

    With names, or values, somebody has said what the ids are.
    """
    if maps.values:
        return
    present = sorted(maps.pixels)
    listed = ",".join(map(str, present))
    if mask_advice.are_interpolated(maps.pixels):
        raise MaskError(
            f"the masks of {maps.masks.name} hold {len(present)} ids, nearly all pixels being 0 or 255: they look "
            "resized with interpolation, or compressed; make them again without (nearest), as PNG"
        )
    if present == [0, IGNORED]:
        raise MaskError(
            f"the masks of {maps.masks.name} hold ids 0 and 255 alone, and 255 is ignored by default, which leaves "
            "1 class; at least two were expected: give --mask-values 0,255 to learn 255 as the second class"
        )
    if named or not mask_advice.look_like_levels([one for one in present if one not in maps.ignored]):
        return
    if IGNORED in present:
        middle = [one for one in present if 0 < one < IGNORED]
        raise MaskError(
            f"the masks of {maps.masks.name} hold ids {listed.replace(',', ', ')}, which look like levels of gray: "
            f"read as they are, 255 is ignored and {max(middle) + 1} classes come of {len(present) - 1} ids; give "
            f"--mask-values {listed} to learn all of them, or --mask-values 0,255"
            + "".join(f" --ignore {one}" for one in middle)
            + " to leave out those between"
        )
    maps.notes.append(
        f"ids {listed.replace(',', ', ')} are far apart, so most of the {max(present) + 1} classes never occur: "
        f"--mask-values {listed} learns those that do"
    )


def _proposed_names(beside: Sequence[Path], maps: Maps) -> list[str]:
    """A file beside the masks that could name the ids."""
    for file in find_class_files(beside):
        try:
            names = read_class_file(file)
        except UserError:
            continue
        if len(names) >= 2 and set(maps.ids) <= set(names):
            return [
                f"{file} names {len(names)} classes ({some(names.values(), 3)}): take them with --class-names {file}"
            ]
    return []


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
        names = [class_name(line.strip()) for line in read_text(file).split("\n")]
    except TextError as error:
        raise MaskError(str(error)) from None
    except OSError as error:
        raise MaskError(f"{file} cannot be read: {error.strerror}") from None
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
    values = decode.oriented(values, head.orientation)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 1 << 16:
        raise BadImage("UNSUPPORTED_MODE", f"{values.dtype} pixels; whole numbers from 0 to 65535 were expected")
    return values if values.dtype == np.uint8 else values.astype(np.uint16)


def _look_at_all(maps: Maps, console: Console) -> dict[int, Drawn]:
    """Count the ids of every mask, and hold its size against the image's; returns what those were drawn on that tell.

    Raises MaskError for what is no mask.
    """
    every = max(1, len(maps.places) // mask_advice.SAMPLES)
    drawn: dict[int, Drawn] = {}
    whole = 0  # masks of 0 and 255 alone
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
            if (where := _drawn_on(maps, row, ids.shape)) is not None:
                drawn[row] = where
            counts = np.bincount(ids.ravel())
            present = counts.nonzero()[0].tolist()
            whole += present == [0, IGNORED] or present == [IGNORED]
            maps.images.update(present)
            maps.pixels.update({one: int(counts[one]) for one in present})
            maps.sizes.append((ids.shape[0], ids.shape[1]))
            if done % every == 0 and len(maps.samples) < mask_advice.SAMPLES:
                maps.samples.append(mask_advice.thinned(ids))
            bar.update(done)
    if not maps.places:
        raise MaskError(f"no mask of {maps.masks.name} can be read: {some(maps.unreadable)}; PNG files were expected")
    if 0 < whole < len(maps.places) and whole > len(maps.places) // 10 and not maps.values:
        maps.notes.append(
            f"{whole} of {len(maps.places)} masks hold 255 and at most 0 beside it: 255 is ignored, so check that they "
            "are not masks of another kind (0 and 255 for two classes)"
        )
    return drawn


def _look_at_headers(maps: Maps) -> dict[int, Drawn]:
    """As `_look_at_all`, by the sizes of masks alone."""
    drawn: dict[int, Drawn] = {}
    for row, place in maps.places.items():
        try:
            head = decode.header(maps.masks.read(place))
        except BadImage:  # said when it is read
            continue
        if (where := _drawn_on(maps, row, (head.height, head.width), refuse=False)) is not None:
            drawn[row] = where
    return drawn


def _drawn_on(maps: Maps, row: int, shape: tuple[int, ...], *, refuse: bool = True) -> Drawn | None:
    """What a mask of this shape was drawn on; None where there is but one answer. Raises MaskError for another size."""
    try:
        head = decode.header(maps.source.read(row), maps.source.reading)
    except BadImage:  # for whoever scans the images to say
        return None
    where = drawn_on((shape[0], shape[1]), head)
    if where is Drawn.NEITHER and refuse:
        raise MaskError(
            f"mask {maps.masks.names[maps.places[row]]} has {sides(shape)} pixels, but its image "
            f"{maps.source.names[row]} is shown with {sides(head.full_size)}; masks of the images' own size "
            "were expected: resize them without interpolation (nearest)"
        )
    return where


def _drawn_on_stored(maps: Maps, drawn: dict[int, Drawn]) -> bool:
    """Whether the masks are of stored pixels; notes what was found. Raises MaskError where some are and others not."""
    rows = {where: [row for row, found in drawn.items() if found is where] for where in Drawn}
    names = maps.source.names
    if rows[Drawn.STORED] and rows[Drawn.SHOWN]:
        raise MaskError(
            f"the mask of {names[rows[Drawn.STORED][0]]} was drawn on its stored pixels, that of "
            f"{names[rows[Drawn.SHOWN][0]]} on the image as shown (EXIF orientation); one way for all was expected: "
            "write upright images without orientation, and their masks"
        )
    if rows[Drawn.STORED]:
        turned = [*rows[Drawn.STORED], *rows[Drawn.UNKNOWN]]
        maps.notes.append(
            f"{len(turned)} images carry an orientation, and their masks were drawn on the stored pixels: they are "
            f"turned with their image: {some(names[row] for row in sorted(turned))}"
        )
        return True
    if rows[Drawn.UNKNOWN] and not rows[Drawn.SHOWN]:
        maps.notes.append(
            f"{len(rows[Drawn.UNKNOWN])} images carry an orientation that leaves their size as it is; their masks are "
            f"taken as drawn on the image as shown: {some(names[row] for row in rows[Drawn.UNKNOWN])}"
        )
    return False


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
