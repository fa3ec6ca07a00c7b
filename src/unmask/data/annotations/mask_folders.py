"""Find the segmentation masks of a folder of images, and pair them with the images by name."""

from __future__ import annotations

import os
from pathlib import Path

from unmask.data.sources.source import Source
from unmask.errors import UserError, listed

IMAGE_FOLDER, MASK_FOLDERS = "images", ("labels", "masks", "annotations")
CLASSES_FILE = "classes.txt"


class MaskError(UserError):
    """Raised for segmentation masks that cannot be used."""


def find_folders(data: str, masks: str | None) -> tuple[str, str, list[Path]]:
    """Return the paths of images and masks, and the folders to search for `classes.txt`.

    Raises MaskError if no masks are found.
    """
    root = Path(data)
    inside = root / IMAGE_FOLDER
    has_images = inside.is_dir()
    if masks is not None:
        if not os.path.exists(masks):
            raise MaskError(f"mask folder {masks} does not exist; expected a folder of masks named like their images")
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
        f"found no masks for {data}; expected {data.rstrip('/')}/{IMAGE_FOLDER} beside {data.rstrip('/')}/"
        f"{{{','.join(MASK_FOLDERS)}}}, or a folder named with --annotations"
    )


def pair(source: Source, masks: Source) -> dict[int, int]:
    """Return the row in `masks` for each row in `source`, paired by name without extension. Raises MaskError."""
    stems: dict[str, int] = {}
    for place, name in enumerate(masks.names):
        stem = os.path.splitext(name)[0]
        if stem in stems:
            raise MaskError(
                f"masks {masks.names[stems[stem]]} and {name} of {masks.name} both belong to the image {stem}; "
                "expected one mask for each image: delete one"
            )
        stems[stem] = place
    own = [os.path.splitext(name)[0] for name in source.names]
    places = {row: stems[stem] for row, stem in enumerate(own) if stem in stems}
    if not places:
        raise MaskError(
            f"none of {len(source)} images of {source.name} has a mask in {masks.name}: got {listed(masks.names)}; "
            f"expected {own[0]}.png for {source.names[0]}: name masks like their images, in the same sub-folders"
        )
    return places
