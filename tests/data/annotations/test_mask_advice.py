"""Real-world segmentation masks: gray levels, void ids, class names in other files, EXIF, and lost detail."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from unmask.data.annotations import mask_advice
from unmask.data.annotations.class_files import find_class_files, read_class_file
from unmask.data.annotations.mask_folders import MaskError
from unmask.data.annotations.open_masks import open_masks
from unmask.data.annotations.segmentation_masks import MaskOptions
from unmask.errors import UserError

SIZE = (40, 60)


def folder(root, masks, *, orientation=None):
    """Write images and their masks (H, W) of ids. orientation: EXIF orientation of each image, or None."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number, ids in enumerate(masks):
        pixels = np.repeat((ids % 251).astype(np.uint8)[..., None], 3, 2)
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation[number]
        Image.fromarray(pixels).save(root / "images" / f"{number}.png", exif=exif)
        Image.fromarray(ids.astype(np.uint8)).save(root / "masks" / f"{number}.png")
    return root


def halves(*ids, size=SIZE):
    """Return a mask with vertical stripes of these ids."""
    return np.repeat(np.array(ids)[np.arange(size[1]) * len(ids) // size[1]][None], size[0], 0)


def notes(maps):
    return "\n".join(maps.lines())


def test_gray_level_masks_are_rejected_with_the_options_that_fix_them(tmp_path):
    two, three = folder(tmp_path / "2", [halves(0, 255)] * 3), folder(tmp_path / "3", [halves(0, 128, 255)] * 3)
    with pytest.raises(MaskError, match=r"only ids 0 and 255, .* set --mask-values 0,255 to make 255"):
        open_masks(two)
    with pytest.raises(MaskError, match=r"129 classes; .* --mask-values 0,128,255 .* --mask-values 0,255 --ignore 128"):
        open_masks(three)
    found = open_masks(two, options=MaskOptions((0, 255)))
    assert found.classes == ("class 0", "class 255")
    assert found.read(0)[0, ::30].tolist() == [0, 1]
    assert open_masks(three, options=MaskOptions((0, 128, 255))).read(0)[0, ::20].tolist() == [0, 1, 2]
    trimap = open_masks(three, ignored=(128,), options=MaskOptions((255, 0)))
    assert trimap.read(0)[0, ::20].tolist() == [1, 255, 0], "classes have the order of the values, and 128 is ignored"
    again = open_masks(three, ignored=(128,), options=MaskOptions((255, 0)), classes=trimap.classes, look=False)
    assert (again.read(0) == trimap.read(0)).all()
    (three / "masks" / "classes.txt").write_text("fore\nback\n")
    assert open_masks(three, ignored=(128,), options=MaskOptions((255, 0))).classes == ("fore", "back")


@pytest.mark.parametrize("values", [(0, 0), (0, 70_000), (0,), (7, 0)])
def test_invalid_mask_values_are_rejected(tmp_path, values):
    with pytest.raises(MaskError, match="mask value"):
        open_masks(folder(tmp_path, [halves(0, 1)]), ignored=(7,), options=MaskOptions(values))


def test_interpolated_masks_are_rejected(tmp_path):
    ids = np.asarray(Image.fromarray(halves(0, 255).astype(np.uint8)).resize((60, 40), Image.Resampling.BICUBIC))
    blurred = ids.copy()
    blurred[:1] = np.linspace(0, 255, 60).astype(np.uint8)
    with pytest.raises(
        MaskError, match=r"nearly all pixels are 0 or 255: they were probably resized with interpolation"
    ):
        open_masks(folder(tmp_path, [blurred]))


def test_sparse_ids_and_mixed_masks_are_reported(tmp_path):
    apart = open_masks(folder(tmp_path / "a", [halves(0, 40, 80)]))
    assert "--mask-values 0,40,80 to use only these ids as classes" in notes(apart)
    mixed = open_masks(folder(tmp_path / "b", [halves(0, 1), halves(0, 1), halves(0, 255)]))
    assert "1 of 3 masks have no ids except 0 and 255" in notes(mixed)
    assert "1 of 3" not in notes(open_masks(folder(tmp_path / "c", [halves(0, 1), halves(0, 1, 255)])))


def streets(void):
    """Return masks with random blocks of ids 0 to 3, separated by the id `void`."""
    random, masks = np.random.default_rng(0), []
    for _ in range(6):
        ids = np.full(SIZE, void)
        for row in range(4):
            for column in range(6):
                ids[row * 10 + 1 : row * 10 + 9, column * 10 + 1 : column * 10 + 9] = random.integers(0, 4)
        masks.append(ids)
    return masks


def test_void_id_is_suggested_by_its_name_or_its_borders(tmp_path):
    unnamed = folder(tmp_path / "a", streets(4))
    assert "if it is not a class, set --ignore 4" in notes(open_masks(unnamed))
    assert "--ignore" not in notes(open_masks(unnamed, ignored=(4,)))
    (unnamed / "classes.txt").write_text("road\nsky\ntree\ncar\nVoid\n")
    assert "id 4 is named 'Void', which is rarely a class; exclude it from loss and metrics with --ignore 4" in notes(
        open_masks(unnamed)
    )
    (unnamed / "classes.txt").write_text("road\nsky\ntree\ncar\nfence\n")
    assert "--ignore" not in notes(open_masks(unnamed))
    plain = [halves(*np.random.default_rng(i).permutation(6)) for i in range(6)]
    assert "--ignore" not in notes(open_masks(folder(tmp_path / "b", plain)))
    assert not mask_advice.VOID.search("avoidable border collie".replace("border", "boarder"))


# ---------------------------------------------------------------------------------------------------------------- names

FILES = {
    "codes.txt": "road\nsky\nV\u00f6gel\n",
    "obj.names": "road\nsky\nVo\u0308gel",
    "label_colors.txt": "64 128 64\troad\n192 0 128\tsky\n0 128 192\tV\u00f6gel\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nroad:0,0,0::\nsky:1,2,3::\nV\u00f6gel:::\n",
    "class_dict.csv": "name,r,g,b\nroad,1,2,3\nsky,1,2,3\nV\u00f6gel,1,2,3\n",
    "classes.csv": "id,name\n1,sky\n0,road\n2,V\u00f6gel\n",
    "labels.txt": "0: road\n2: V\u00f6gel\n1: sky\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_with_class_names_are_found_suggested_and_read(tmp_path, name):
    root = folder(tmp_path, [halves(0, 1, 2)] * 2)
    file = root / name
    file.write_text(FILES[name], encoding="utf-8")
    assert read_class_file(file) == {0: "road", 1: "sky", 2: "V\u00f6gel"}
    assert find_class_files([root / "masks", root]) == [file]
    proposed = open_masks(root)
    assert proposed.classes == ("class 0", "class 1", "class 2")
    assert f"names 3 classes (road, sky, V\u00f6gel); use them with --class-names {file}" in notes(proposed)
    taken = open_masks(root, options=MaskOptions(names=file))
    assert taken.classes == ("road", "sky", "V\u00f6gel")
    assert "--class-names" not in notes(taken)


def test_unsuitable_class_names_are_not_suggested_and_undecodable_files_are_rejected(tmp_path):
    root = folder(tmp_path, [halves(0, 1, 2)])
    (root / "codes.txt").write_text("road\nsky\n")
    assert "--class-names" not in notes(open_masks(root))
    (root / "codes.txt").write_bytes("Stra\u00dfe\nHimmel\nB\u00e4ume\n".encode("cp1252"))
    assert "--class-names" not in notes(open_masks(root))
    with pytest.raises(UserError, match=r"line 1 of .*codes\.txt is not UTF-8"):
        open_masks(root, options=MaskOptions(names=root / "codes.txt"))
    (root / "classes.txt").write_bytes("a\nb\nc\n".encode("utf-16"))
    assert open_masks(root).classes == ("a", "b", "c")


def test_masks_of_stored_pixels_are_rotated_with_their_image(tmp_path):
    ids = halves(0, 1, 2)
    ids[:10] = 3
    root = folder(tmp_path, [ids] * 8, orientation=range(1, 9))
    found = open_masks(root)
    assert found.stored
    for row in found.rows.tolist():
        with Image.open(root / "images" / f"{row}.png") as image:
            wanted = np.asarray(ImageOps.exif_transpose(image))[:, :, 0]
        assert (found.read(row) == wanted).all(), f"orientation {row + 1}"
    assert "7 images have an EXIF orientation, and their masks, which refer to the stored pixels" in notes(found)
    for options in (MaskOptions(stored=True), None):  # the options of a resumed run, and of test images
        again = open_masks(root, classes=found.classes, look=False, options=options)
        assert (again.read(5) == found.read(5)).all()


def test_masks_in_display_orientation_are_not_rotated_and_mixed_orientations_are_rejected(tmp_path):
    ids = halves(0, 1)
    root = folder(tmp_path, [ids, ids], orientation=(6, 3))
    Image.fromarray(ids.T.astype(np.uint8)).save(root / "masks" / "0.png")
    found = open_masks(root)
    assert not found.stored
    assert (found.read(0) == ids.T).all()
    assert (found.read(1) == ids).all()
    folder(root, [ids, ids, ids], orientation=(6, 6, 1))
    Image.fromarray(ids.T.astype(np.uint8)).save(root / "masks" / "0.png")
    with pytest.raises(MaskError, match=r"mask of 1\.png refers to the stored pixels, that of 0\.png to"):
        open_masks(root)


def test_detail_lost_to_the_image_size_is_reported(tmp_path):
    ids = halves(0, 1)
    ids[:, ::9] = 2  # stripes that are one pixel wide
    found = open_masks(folder(tmp_path, [ids] * 3))
    line, costly = found.size_line((8, 8), 4)
    assert costly
    assert line.startswith(
        "the model is trained on masks of 8 x 8 pixels; the mask files have 40 x 60: perfect predictions"
    )
    assert "(class 2 " in line, "the thin class is named first"
    assert "--set data.size=[40,60]" in line
    same, costly = found.size_line((40, 60), 4)
    assert not costly
    assert same == "the model is trained on masks of 40 x 60 pixels; the mask files have 40 x 60"
    assert mask_advice.ceiling(found.samples, (40, 60), 3).tolist() == [1, 1, 1]
