"""Open segmentation masks with their images, number their classes, and reject implausible masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmask.batch import IGNORED
from unmask.console import Console
from unmask.data.annotations import mask_advice
from unmask.data.annotations.class_files import find_class_files, read_class_file, read_class_list
from unmask.data.annotations.mask_folders import CLASSES_FILE, MaskError, find_folders, pair
from unmask.data.annotations.orientation import DrawnOn, drawn_on
from unmask.data.annotations.segmentation_masks import UNKNOWN, MaskOptions, SegmentationMasks, read_ids, sides
from unmask.data.decode import decode
from unmask.data.decode.bad_image import BadImage
from unmask.data.sources.open_source import open_source
from unmask.errors import UserError, listed


def open_masks(
    data: str | Path,
    masks: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    ignored: Sequence[int] = (),
    options: MaskOptions | None = None,
    look: bool = True,
    console: Console | None = None,
) -> SegmentationMasks:
    """Open the images of DATA and their masks; images without a mask are left out of `rows`.

    masks: folder, tar or zip, or None to search the layouts described in `segmentation_masks.py`.
    classes: names, in order, of the model evaluated on these images, or None to read or number them.
    ignored: ids that are not classes, in addition to IGNORED.
    options: see `MaskOptions`.
    look: whether to read all masks now; False requires `classes`.
    Raises MaskError, SourceError.
    """
    images, folder, beside = find_folders(str(data), None if masks is None else str(masks))
    source, found = open_source(images), open_source(folder)
    options = options or MaskOptions()
    _require_values(options.values, ignored)
    no_class = tuple(sorted({IGNORED, *ignored} - set(options.values)))
    if wrong := [one for one in no_class if not 0 <= one < 1 << 16]:
        raise MaskError(f"got ignored id {wrong[0]}; expected a number from 0 to 65535, as stored in the masks")
    maps = SegmentationMasks(source, found, pair(source, found), ignored=no_class, values=options.values)
    if look:
        drawn = _read_all(maps, console or Console(quiet=True))
    else:
        drawn = {} if options.stored is not None else _read_headers(maps)
    maps.stored = options.stored if options.stored is not None else _drawn_on_stored(maps, drawn)
    if classes is not None:
        maps.classes = tuple(classes)
    else:
        assert look, "without `classes`, the masks must be read to number the classes"
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
            f"got mask value {wrong[0]}; expected distinct ids from 0 to 65535 that are not also given to --ignore"
        )
    if len(values) == 1:
        raise MaskError(f"got one mask value, {values[0]}; expected at least two, such as --mask-values 0,255")


def _names(beside: Sequence[Path], options: MaskOptions, maps: SegmentationMasks) -> list[str] | None:
    """Return class names in the order of ids or values, from `options.names` or `classes.txt`.

    Returns None if there is no such file.
    """
    if options.names is None:
        file = next((folder / CLASSES_FILE for folder in beside if (folder / CLASSES_FILE).is_file()), None)
        try:
            return None if file is None else read_class_list(file)
        except UserError as error:
            raise MaskError(str(error)) from None
    found = read_class_file(options.names)
    if maps.values and not set(found) >= set(maps.values):
        return [found[one] for one in sorted(found)]
    if maps.values:
        return [found[one] for one in maps.values]
    return [found.get(one, f"class {one}") for one in range(max(found) + 1)]


def _classes(maps: SegmentationMasks, names: Sequence[str] | None) -> tuple[str, ...]:
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


def _refuse_levels(maps: SegmentationMasks, *, named: bool) -> None:
    """Raise MaskError for masks with gray levels instead of ids; add a note for doubtful masks.

    Values given by the user are always accepted, and so are sparse ids that have names.
    """
    if maps.values:
        return
    present = sorted(maps.pixels)
    ids = ",".join(map(str, present))
    if mask_advice.are_interpolated(maps.pixels):
        raise MaskError(
            f"the masks of {maps.masks.name} have {len(present)} ids, but nearly all pixels are 0 or 255: they were "
            "probably resized with interpolation, or compressed; create them again without interpolation (nearest), "
            "as PNG"
        )
    if present == [0, IGNORED]:
        raise MaskError(
            f"the masks of {maps.masks.name} have only ids 0 and 255, and 255 is ignored by default, which leaves "
            "1 class; expected at least two: set --mask-values 0,255 to make 255 the second class"
        )
    if named or not mask_advice.look_like_levels([one for one in present if one not in maps.ignored]):
        return
    if IGNORED in present:
        middle = [one for one in present if 0 < one < IGNORED]
        raise MaskError(
            f"the masks of {maps.masks.name} have ids {ids.replace(',', ', ')}, which look like gray levels: 255 "
            f"would be ignored, and the other {len(present) - 1} ids would make {max(middle) + 1} classes; set "
            f"--mask-values {ids} to use all of them as classes, or --mask-values 0,255"
            + "".join(f" --ignore {one}" for one in middle)
            + " to ignore the ids in between"
        )
    maps.notes.append(
        f"ids {ids.replace(',', ', ')} are far apart, so most of the {max(present) + 1} classes never occur; set "
        f"--mask-values {ids} to use only these ids as classes"
    )


def _proposed_names(beside: Sequence[Path], maps: SegmentationMasks) -> list[str]:
    """Return a note about a file beside the masks that could name the ids, or []."""
    for file in find_class_files(beside):
        try:
            names = read_class_file(file)
        except UserError:
            continue
        if len(names) >= 2 and set(maps.ids) <= set(names):
            return [
                f"{file} names {len(names)} classes ({listed(names.values(), 3)}); use them with --class-names {file}"
            ]
    return []


def _read_all(maps: SegmentationMasks, console: Console) -> dict[int, DrawnOn]:
    """Count the ids of every mask, and compare its size with that of its image. Raises MaskError for unusable masks.

    Returns, by row, whether the mask of an image with an EXIF orientation refers to the displayed or the stored pixels.
    """
    every = max(1, len(maps.places) // mask_advice.SAMPLES)
    drawn: dict[int, DrawnOn] = {}
    only_levels = 0  # number of masks whose only ids are 255, or 0 and 255
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
            only_levels += present == [0, IGNORED] or present == [IGNORED]
            maps.images.update(present)
            maps.pixels.update({one: int(counts[one]) for one in present})
            maps.sizes.append((ids.shape[0], ids.shape[1]))
            if done % every == 0 and len(maps.samples) < mask_advice.SAMPLES:
                maps.samples.append(mask_advice.thinned(ids))
            bar.update(done)
    if not maps.places:
        raise MaskError(f"no mask of {maps.masks.name} can be read: {listed(maps.unreadable)}; expected PNG files")
    if 0 < only_levels < len(maps.places) and only_levels > len(maps.places) // 10 and not maps.values:
        maps.notes.append(
            f"{only_levels} of {len(maps.places)} masks have no ids except 0 and 255, and 255 is ignored; check "
            "whether they use 0 and 255 for two classes"
        )
    return drawn


def _read_headers(maps: SegmentationMasks) -> dict[int, DrawnOn]:
    """Return the same as `_read_all`, but read only the headers of the masks and report no errors."""
    drawn: dict[int, DrawnOn] = {}
    for row, place in maps.places.items():
        try:
            head = decode.header(maps.masks.read(place))
        except BadImage:  # the error is reported when the mask is read
            continue
        if (where := _drawn_on(maps, row, (head.height, head.width), refuse=False)) is not None:
            drawn[row] = where
    return drawn


def _drawn_on(maps: SegmentationMasks, row: int, shape: tuple[int, ...], *, refuse: bool = True) -> DrawnOn | None:
    """Return whether a mask of this shape refers to the displayed or the stored pixels, or None without orientation.

    Raises MaskError if the mask has neither size.
    """
    try:
        head = decode.header(maps.source.read(row), maps.source.reading)
    except BadImage:  # the scan reports unreadable images
        return None
    where = drawn_on((shape[0], shape[1]), head)
    if where is DrawnOn.NEITHER and refuse:
        raise MaskError(
            f"mask {maps.masks.names[maps.places[row]]} has {sides(shape)} pixels; expected {sides(head.full_size)}, "
            f"the size of its image {maps.source.names[row]}: resize masks without interpolation (nearest)"
        )
    return where


def _drawn_on_stored(maps: SegmentationMasks, drawn: dict[int, DrawnOn]) -> bool:
    """Return whether the masks refer to the stored pixels, and add a note. Raises MaskError if only some masks do."""
    rows = {where: [row for row, found in drawn.items() if found is where] for where in DrawnOn}
    names = maps.source.names
    if rows[DrawnOn.STORED] and rows[DrawnOn.SHOWN]:
        raise MaskError(
            f"the mask of {names[rows[DrawnOn.STORED][0]]} refers to the stored pixels, that of "
            f"{names[rows[DrawnOn.SHOWN][0]]} to the displayed image (EXIF orientation); expected the same for all: "
            "save images upright, without an orientation tag, and masks for those"
        )
    if rows[DrawnOn.STORED]:
        turned = [*rows[DrawnOn.STORED], *rows[DrawnOn.UNKNOWN]]
        maps.notes.append(
            f"{len(turned)} images have an EXIF orientation, and their masks, which refer to the stored pixels, are "
            f"rotated with them: {listed(names[row] for row in sorted(turned))}"
        )
        return True
    if rows[DrawnOn.UNKNOWN] and not rows[DrawnOn.SHOWN]:
        maps.notes.append(
            f"{len(rows[DrawnOn.UNKNOWN])} images have an EXIF orientation that does not change their size; their "
            f"masks are assumed to refer to the displayed image: {listed(names[row] for row in rows[DrawnOn.UNKNOWN])}"
        )
    return False


def _require_sound(maps: SegmentationMasks, *, training: bool) -> None:
    """Raise MaskError for too few or too many classes, and for ids without a class."""
    count = len(maps.classes)
    if count < 2:
        found = ", ".join(map(str, sorted(maps.pixels)))
        raise MaskError(
            f"the masks of {maps.masks.name} have ids {found}, which leaves {count} class{'es' * (count != 1)}; "
            f"expected at least two, numbered from 0 (id {IGNORED} is ignored: give its class another id)"
        )
    if len(there := [one for one in maps.ids if maps.pixels[one]]) == 1 and training:
        raise MaskError(f"the masks of {maps.masks.name} have only one class, id {there[0]}; expected at least two")
    known = {*maps.ids, *maps.ignored}
    if unknown := sorted(one for one in maps.pixels if one not in known):
        shown = listed(str(one) for one in unknown)
        raise MaskError(
            f"the masks of {maps.masks.name} have the unknown id {shown} (in {maps.images[unknown[0]]} of "
            f"{len(maps.places)} masks); expected ids {maps.ids[0]} to {maps.ids[-1]} of the {count} classes: name it "
            f"in {CLASSES_FILE}, or ignore it with --ignore {unknown[0]}"
        )
    if count > UNKNOWN:
        raise MaskError(
            f"got {count} classes (the masks of {maps.masks.name} have ids up to {max(maps.pixels, default=count)}); "
            f"expected at most {UNKNOWN}: number classes from 0 without gaps"
        )
