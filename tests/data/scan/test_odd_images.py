"""Images that are probably not training images are reported: masks among photographs, and black images."""

import numpy as np
import pytest
from corpus import file_of, noisy, smooth
from PIL import Image

from unmask.console import Console
from unmask.data.scan.odd_images import constant_line, mask_like, mask_warnings
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.engine.check_data import check_data

PHOTO, MASK = noisy(32, 40), (smooth(32, 40, 1, top=250)[:, :, 0] // 60).astype(np.uint8)


def palette(ids):
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    return file_of(image, "PNG")


def put(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def streets(root, images="images/train", masks="labels/train", mask=None, count=8):
    for number in range(count):
        put(root, f"{images}/{number}.jpg", file_of(PHOTO, "JPEG"))
        put(root, f"{masks}/{number}.png", mask or palette(MASK))
    return root


@pytest.mark.parametrize(
    ("images", "masks", "pattern"),
    [
        ("images/train", "labels/train", "labels/*"), ("images", "masks", "masks/*"),
        ("JPEGImages", "SegmentationClass", "SegmentationClass/*"), ("train", "trainannot", "trainannot/*"),
        ("leftImg8bit/a", "gtFine/a", "gtFine/*"), ("photos", "other", "other/*"),
        ("a", "ground_truth", "ground_truth/*"),
    ],
)  # fmt: skip
def test_mask_folders_are_reported_with_the_fix(tmp_path, images, masks, pattern):
    for mask in (palette(MASK), file_of(MASK, "PNG"), file_of(np.repeat(MASK[..., None] * 50, 3, 2), "PNG")):
        root = streets(tmp_path, images, masks, mask)
        (one,) = mask_like(open_source(root))
        assert (one.pattern, one.count) == (pattern, 8)
        (line,) = mask_warnings(open_source(root))
        assert line.startswith(f"8 of 16 images, {pattern[:-1]}, look like segmentation masks of the others")
        assert f"--exclude '{pattern}'" in line


def test_suggested_folder_contains_all_images(tmp_path):
    for part in ("train", "val"):
        streets(tmp_path, f"images/{part}", f"labels/{part}")
    (line,) = mask_warnings(open_source(tmp_path))
    assert f"use only {tmp_path}/images" in line


def test_masks_beside_their_images_are_reported(tmp_path):
    for number in range(6):
        put(tmp_path, f"{number}.jpg", file_of(PHOTO, "JPEG"))
        put(tmp_path, f"{number}_mask.png", palette(MASK))
    (line,) = mask_warnings(open_source(tmp_path))
    assert "6 of 12 images, *_mask.png, look like segmentation masks" in line
    assert "--exclude '*_mask.png'" in line


def test_photographs_and_drawings_are_not_reported_as_masks(tmp_path):
    for folder in ("cat", "masks", "labels"):  # photographs in folders that are named like mask folders
        for number in range(6):
            put(tmp_path / "photos", f"{folder}/{number}.png", file_of(noisy(32, 40, seed=number), "PNG"))
    assert mask_warnings(open_source(tmp_path / "photos")) == []
    for folder in ("0", "1", "2"):  # drawings in two colours, with the same names in every class
        for number in range(6):
            put(tmp_path / "drawn", f"{folder}/{number}.png", file_of(MASK % 2 * 255, "PNG"))
    assert mask_warnings(open_source(tmp_path / "drawn")) == []
    assert mask_warnings(open_source("shapes:40")) == []
    assert mask_warnings(open_source(streets(tmp_path / "s") / "labels")) == [], "masks alone"


def test_check_warns_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("unmask.engine.check_data.MEASURE_SECONDS", 0.1)
    check_data(str(streets(tmp_path)), Console(), sample=None, workers=0)
    said = capsys.readouterr().err
    assert "warning: 8 of 16 images, labels/, look like segmentation masks" in said
    assert f"use only {tmp_path}/images/train" in said


def test_constant_images_are_counted_and_reported(tmp_path):
    for number in range(3):
        put(tmp_path / "mixed", f"{number}.png", file_of(noisy(8, 8, seed=number), "PNG"))
    assert scan(open_source(tmp_path / "mixed")).constant is None
    put(tmp_path / "mixed", "white.png", file_of(np.full((8, 8, 3), 255, np.uint8), "PNG"))
    found = scan(open_source(tmp_path / "mixed"))
    assert found.constant is not None
    assert constant_line(found.constant, found.good) == (
        "in 1 of 4 images, all pixels have the same value (all black, for example): white.png"
    )
    for number in range(3):
        put(tmp_path / "black", f"{number}.png", file_of(np.zeros((8, 8, 3), np.uint8), "PNG"))
    found = scan(open_source(tmp_path / "black"))
    assert found.constant is not None
    assert found.constant.alike
    assert constant_line(found.constant, found.good).startswith(
        "in each of the 3 images, all pixels have the same value"
    )


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_large_values_with_little_contrast_are_not_constant(tmp_path, dtype):
    values = np.full((16, 16), 60_000, dtype)
    np.save(tmp_path / "flat.npy", values)
    values[3, 4] += 40
    np.save(tmp_path / "one.npy", values)
    found = scan(open_source(tmp_path))
    assert found.constant is not None
    assert found.constant.names == ("flat.npy",)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_float_images_of_any_unit_are_distinguished_from_constant_images(tmp_path, scale):
    np.save(tmp_path / "flat.npy", np.full((600, 600), 0.1 * scale, np.float32))
    np.save(tmp_path / "noise.npy", (noisy(600, 600)[:, :, 0] * (scale / 255)).astype(np.float32))
    found = scan(open_source(tmp_path))
    assert found.constant is not None
    assert found.constant.names == ("flat.npy",)
