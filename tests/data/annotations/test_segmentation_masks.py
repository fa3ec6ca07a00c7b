"""Segmentation masks: they stay aligned with their image in every crop, and invalid masks are rejected."""

import numpy as np
import pytest
import torch
from corpus import damaged, file_of, noisy, png
from PIL import Image

from unmask.batch import IGNORED, ImageSpec
from unmask.data.annotations.mask_folders import MaskError
from unmask.data.annotations.open_masks import open_masks
from unmask.data.annotations.segmentation_masks import read_ids
from unmask.data.augment import CropConfig, cut, cut_map
from unmask.data.decode.bad_image import BadImage
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, eval_batches, training_batches
from unmask.data.order import Order

SPEC = ImageSpec(3, (16, 24), "uint8", (0.0,) * 3, (1.0,) * 3)


def red(image):
    """Return a mask that is a function of its image."""
    return (image[:, :, 0] > 128).astype(np.uint8)


def blobs(height, width, seed):
    """Return an image of large blocks with few edges."""
    small = noisy(4, 5, seed=seed)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def folder(root, count=6, *, images="images", masks="labels", size=(40, 60)):
    for i in range(count):
        image = blobs(size[0] + i, size[1] - i, i)
        for name, pixels in ((images, image), (masks, red(image))):
            (root / name / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name / "a" / f"{i}.png")
    return root


def put(root, pixels, name="0.png", masks="labels"):
    data = pixels if isinstance(pixels, bytes) else file_of(pixels, "PNG")
    (root / masks / "a" / name).write_bytes(data)


@pytest.mark.parametrize("kind", ["random_resized", "random", "center"])
def test_segmentation_mask_stays_aligned_with_its_image_in_every_crop(tmp_path, kind):
    maps = open_masks(folder(tmp_path))
    images = ImageReader(maps.source, maps.rows, SPEC, CropConfig(kind=kind, eval_share=0.8), annotations=maps)
    flipped = ImageReader(maps.source, maps.rows, SPEC, CropConfig(kind=kind, eval_share=0.8))
    wrong = mirrored = total = 0
    for got, bare in zip(*(training_batches(one, MicroBatches(0, 12, 5), workers=0) for one in (images, flipped)),
                         strict=True):  # fmt: skip
        batch = got.batch
        assert torch.equal(batch.images, bare.batch.images), "annotations change no pixel"
        assert batch.maps is not None
        assert batch.maps.shape == (12, 16, 24)
        assert batch.maps.dtype == torch.int64
        truth = (batch.images[:, 0] > 128).long()
        wrong += int((batch.maps != truth).sum())
        mirrored += int((batch.maps.flip(2) != truth).sum())
        total += truth.numel()
    assert wrong < 0.05 * total, "only edges may differ"
    assert mirrored > 0.2 * total, "the test can fail"


def test_evaluation_uses_the_whole_image_and_mask(tmp_path):
    maps = open_masks(folder(tmp_path, size=(40, 90)))
    whole = ImageReader(maps.source, maps.rows, SPEC, CropConfig(), training=False, annotations=maps, whole=True)
    (batch,) = eval_batches(whole, maps.rows, batch=6)
    assert batch.maps is not None
    for row, found, image in zip(maps.rows.tolist(), batch.maps, batch.images, strict=True):
        ids = torch.from_numpy(maps.read(row).astype(np.int64))
        shape = ids.shape
        assert found[0, 0] == ids[0, 0]
        assert found[-1, -1] == ids[-1, -1], "both corners are included"
        ys = ((torch.arange(16) + 0.5) * shape[0] / 16).long()
        xs = ((torch.arange(24) + 0.5) * shape[1] / 24).long()
        assert torch.equal(found, ids[ys][:, xs])
        assert ((image[0] > 128).long() != found).float().mean() < 0.1
    centred = ImageReader(maps.source, maps.rows, SPEC, CropConfig(), training=False, annotations=maps)
    assert not torch.equal(next(eval_batches(centred, maps.rows, batch=6)).images, batch.images)


def test_cut_map_agrees_with_hand_computed_masks():
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert cut_map(ids, np.array([0.0, 0, 3, 4]), (3, 4), False).tolist() == ids.tolist()
    assert cut_map(ids, np.array([1.0, 1, 2, 2]), (2, 2), True).tolist() == [[6, 5], [10, 9]]
    assert (
        cut_map(ids, np.array([0.0, 0, 2, 2]), (4, 4), False).tolist()
        == np.kron([[0, 1], [4, 5]], np.ones((2, 2))).tolist()
    )
    outside = cut_map(ids, np.array([-1.0, 2, 4, 4]), (4, 4), False)
    assert outside.tolist() == [[IGNORED] * 4, *[[a, a + 1, IGNORED, IGNORED] for a in (2, 6, 10)]]


def test_mask_and_image_agree_in_every_pixel_without_resampling():
    """If nothing is resampled, image and mask agree in every pixel."""
    stripes = np.repeat((np.arange(32) % 2 * 255).astype(np.uint8)[None, :, None], 32, 0)
    for flip in (False, True):
        box = np.array([3.0, 5, 16, 24])
        assert (cut(stripes, box, (16, 24), flip)[:, :, 0] == cut_map(stripes[:, :, 0], box, (16, 24), flip)).all()


def test_mask_crops_do_not_depend_on_workers_and_batch_size(tmp_path):
    maps = open_masks(folder(tmp_path))
    images = ImageReader(maps.source, maps.rows, SPEC, CropConfig(), annotations=maps)
    one = torch.cat([d.batch.maps for d in training_batches(images, MicroBatches(0, 4, 3), workers=0)])
    two = torch.cat([d.batch.maps for d in training_batches(images, MicroBatches(0, 12, 1), workers=1)])
    assert torch.equal(one, two)
    images.keep_decoded()
    assert torch.equal(images[Order(maps.rows, 0).take(0, 12)].batch.maps, one)


def test_image_with_an_unreadable_mask_is_replaced(tmp_path):
    maps = open_masks(folder(tmp_path))
    put(tmp_path, b"gone", "3.png")
    images = ImageReader(maps.source, maps.rows, SPEC, CropConfig(), annotations=maps)
    (got,) = training_batches(images, MicroBatches(0, 6, 1), workers=0)
    assert 3 not in got.batch.index.tolist()
    assert [bad.name for bad in got.bad] == ["a/3.png"]
    assert "its mask a/3.png" in got.bad[0].detail
    for pixels in (noisy(8, 8, 1), np.full((43, 57), 7, np.uint8)):
        put(tmp_path, pixels, "3.png")
        with pytest.raises(BadImage, match="mask"):
            list(eval_batches(ImageReader(**(vars(images) | {"training": False})), np.array([3]), batch=1))


def test_mask_folders_are_found_automatically(tmp_path):
    root = folder(tmp_path / "x")
    wanted = open_masks(root)
    for data in (root / "images", root / "images" / "a"):
        found = open_masks(data)
        assert [(found.read(row) == wanted.read(row)).all() for row in range(6)] == [True] * 6
    for name in ("masks", "annotations"):
        other = folder(tmp_path / name, masks=name)
        assert open_masks(other).masks.name == str(other / name)
    named = folder(tmp_path / "named", images="photos", masks="ids")
    assert len(open_masks(named / "photos", named / "ids").rows) == 6
    assert len(open_masks(root, root / "labels").source) == 6, "the source contains the images but not the masks"
    with pytest.raises(MaskError, match="found no masks"):
        open_masks(named)
    with pytest.raises(MaskError, match="does not exist"):
        open_masks(named / "photos", named / "none")


def test_images_without_mask_are_left_out_and_listed(tmp_path):
    root = folder(tmp_path)
    (root / "labels" / "a" / "2.png").unlink()
    put(root, red(noisy()), "other.png")
    put(root, damaged((root / "labels" / "a" / "5.png").read_bytes()), "5.png")
    maps = open_masks(root)
    assert maps.rows.tolist() == [0, 1, 3, 4]
    said = "\n".join(maps.lines())
    assert maps.without == ["a/2.png", "a/5.png"]
    assert "2 images without a mask are left out: a/2.png, a/5.png" in said
    assert "1 masks cannot be read" in said
    with pytest.raises(AssertionError, match="without annotations"):
        ImageReader(maps.source, np.arange(6), SPEC, CropConfig(), annotations=maps)


def test_class_ids_names_and_pixel_shares_are_reported(tmp_path):
    root = folder(tmp_path, count=2, size=(10, 11))
    ids = np.zeros((10, 11), np.uint8)
    ids[0], ids[1], ids[2], ids[3] = 1, 3, 4, 255
    put(root, ids)
    ids[:] = 4
    put(root, ids.repeat(2, 0)[:11, :10], "1.png")
    (root / "classes.txt").write_text("road\nsky\n\nvoid\ntree\n".replace("\n\n", "\npole\n") + "\n")
    maps = open_masks(root, ignored=(3,))
    assert maps.classes == ("road", "sky", "pole", "tree")
    assert maps.ids == [0, 1, 2, 4]
    assert maps.ignored == (3, 255)
    assert maps.read(0)[:5, 0].tolist() == [1, IGNORED, 3, IGNORED, 0]
    assert maps.pixels == {0: 66, 1: 11, 3: 11, 4: 121, 255: 11}
    assert maps.images[4] == 2
    assert "10.0% of all pixels are ignored (id 3, id 255)" in maps.lines()[1]
    assert "55.00% of pixels, in 2 images  tree" in "\n".join(maps.lines())
    (root / "classes.txt").unlink()
    numbered = open_masks(root, ignored=(0,))
    assert numbered.classes == ("class 1", "class 2", "class 3", "class 4")
    assert "1 class without any pixels: class 2" in numbered.lines()
    assert not any("without any pixels" in line for line in open_masks(root, ignored=(0, 2)).lines())
    again = open_masks(root, ignored=(3,), classes=maps.classes, look=False)
    assert (again.read(0) == maps.read(0)).all()


@pytest.mark.parametrize(
    ("pixels", "mode", "options"),
    [
        (np.array([[0, 1], [1, 0]], bool), "1", {}),
        (np.array([[0, 3], [2, 1]], np.uint8), "P", {"bits": 2}),
        (np.array([[0, 200], [2, 1]], np.uint8), "P", {}),
        (np.array([[0, 7], [255, 1]], np.uint8), "L", {}),
        (np.array([[0, 300], [2, 65535]], np.uint16), "I;16", {}),
    ],
)
def test_mask_ids_are_read_as_stored(pixels, mode, options):
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    assert image.mode == mode
    assert read_ids(file_of(image, "PNG", **options)).tolist() == pixels.astype(int).tolist()


def test_gray_masks_of_few_bits_are_not_scaled():
    for bits, row in ((2, b"\x1b"), (4, b"\x01\x23")):
        width = 4
        data = png(width, 1, bits, 0, b"\0" + row)
        assert read_ids(data).tolist() == [[0, 1, 2, 3]]


def bad(root, name):
    """Introduce one fault."""
    if name == "colour":
        put(root, noisy(40, 60))
    elif name == "alpha":
        put(root, file_of(Image.new("LA", (60, 40)), "PNG"))
    elif name == "float":
        put(root, file_of(Image.new("F", (60, 40)), "TIFF"), "0.tif")
        (root / "labels" / "a" / "0.png").unlink()
    elif name == "size":
        put(root, np.zeros((60, 40), np.uint8))
    elif name == "jpeg":
        (root / "labels" / "a" / "0.png").unlink()
        put(root, file_of(np.zeros((40, 60), np.uint8), "JPEG"), "0.jpg")
    elif name == "twice":
        put(root, np.zeros((40, 60), np.uint8), "0.bmp")
    elif name == "names":
        (root / "labels" / "a").rename(root / "labels" / "b")
    elif name == "unknown":
        (root / "classes.txt").write_text("a\nb\n")
        put(root, np.full((40, 60), 9, np.uint8))
    elif name == "many":
        put(root, np.full((40, 60), 60_000, np.uint16))
    elif name == "binary":
        for i in range(6):
            put(root, red(blobs(40 + i, 60 - i, i)) * 255, f"{i}.png")
    elif name == "one":
        (root / "classes.txt").write_text("a\nb\n")
        for i in range(6):
            put(root, np.ones((40 + i, 60 - i), np.uint8), f"{i}.png")
    elif name == "empty names":
        (root / "classes.txt").write_text("a\n\nb\n")
    elif name == "same names":
        (root / "labels" / "classes.txt").write_text("a\na\n")
    elif name == "broken":
        for i in range(6):
            put(root, b"text", f"{i}.png")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("colour", r"a/0\.png of .* is a colour image \(mode RGB\); expected a gray or palette PNG"),
        ("alpha", r"colour image \(mode LA\)"),
        ("float", r"whole numbers"),
        ("size", r"has 60 x 40 pixels; expected 40 x 60, the size of its image a/0\.png"),
        ("jpeg", r"a JPEG, whose compression changes ids"),
        ("twice", r"both belong to the image a/0"),
        ("names", r"none of 6 images .* got b/0\.png, b/1\.png, .* and 1 more; expected a/0\.png"),
        ("unknown", r"have the unknown id 9 \(in 1 of 6 masks\); expected ids 0 to 1 of the 2 classes: .* --ignore 9"),
        ("many", r"got 60000 classes .* expected at most 254"),
        (
            "binary",
            r"have only ids 0 and 255, .* which leaves 1 class; expected at least two: set --mask-values 0,255",
        ),
        ("one", r"have only one class, id 1; expected at least two"),
        ("empty names", r"an empty name"),
        ("same names", r"the name 'a' more than once"),
        ("broken", r"no mask of .* can be read"),
    ],
)
def test_invalid_segmentation_masks_are_rejected(tmp_path, name, said):
    root = folder(tmp_path)
    open_masks(root)
    bad(root, name)
    with pytest.raises(MaskError, match=said):
        open_masks(root)


def test_missing_rows_of_a_mask_are_detected(tmp_path):
    """Pillow would leave missing rows black, which is a valid class."""
    root = folder(tmp_path)
    put(root, png(60, 40, 8, 0, (b"\0" + b"\1" * 60) * 30))
    assert open_masks(root).rows.tolist() == [1, 2, 3, 4, 5]


def test_invalid_ignored_id_is_rejected(tmp_path):
    with pytest.raises(MaskError, match="got ignored id 70000"):
        open_masks(folder(tmp_path), ignored=(70_000,))


def test_camvid_layout_with_a_void_class_is_read(tmp_path):
    """Uses CamVid's layout: images/val/*.jpg and labels/val/*.png, ids 0 to 10, and 11 for pixels without a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 7)):
        for number in range(count):
            ids = np.kron(rng.integers(0, 12, (6, 8)), np.ones((30, 30))).astype(np.uint8)
            ids[:30, :30], ids[:30, 30:60] = 11, number  # a block of void pixels and a block of one class per image
            for kind, data in (
                ("images", file_of(noisy(180, 240, seed=number), "JPEG")),
                ("labels", file_of(ids, "PNG")),
            ):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                ending = "jpg" if kind == "images" else "png"
                (tmp_path / kind / split / f"0001TP_{number:06d}.{ending}").write_bytes(data)
    maps = open_masks(tmp_path / "images" / "val", ignored=(11,))
    assert len(maps.rows) == 7
    assert len(maps.classes) == 11
    assert sum(maps.pixels.values()) == 7 * 180 * 240
    assert 0.01 < maps.pixels[11] / sum(maps.pixels.values()) < 0.2
