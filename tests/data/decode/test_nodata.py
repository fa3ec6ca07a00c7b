"""Absent pixels: found by tag, NaN or setting, excluded from the statistics, and not mixed into resampled pixels."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from unmask.batch import IGNORED, Batch, ImageSpec
from unmask.data import augment
from unmask.data.augment import CropConfig
from unmask.data.decode import decode
from unmask.data.decode import nodata as nodata_module
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.nodata import Nodata
from unmask.data.decode.reading import EARLIER, Reading
from unmask.data.device_crops import to_device
from unmask.data.image_reader import ImageReader
from unmask.data.order import SampleIndices
from unmask.data.pack_images import pack_image
from unmask.data.scan import scan_cache
from unmask.data.scan.findings import findings
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.tiff_samples import apply_reading

SPEC = ImageSpec(1, (16, 16), "float32", (250.0,), (60.0,))


def terrain(number: int, *, hole: bool = True, missing: float = -9999) -> np.ndarray:
    """Return (40, 48) float32 with mean 250 and standard deviation 60, and with absent pixels if `hole`."""
    heights = np.random.default_rng(number).standard_normal((40, 48)).astype(np.float32)
    heights = (heights - heights.mean()) / heights.std() * 60 + 250
    if hole:
        heights[8:30, 12:36] = missing
    return heights


def tag(value: str) -> dict:
    return {"extratags": [(42113, "s", 0, value, True)]}


def write(folder: Path, count: int = 10, **given) -> Path:
    """Write GeoTIFFs, every second one with absent pixels."""
    folder.mkdir()
    for number in range(count):
        tifffile.imwrite(folder / f"{number:02}.tif", terrain(number, hole=number % 2 == 0), **given)
    return folder


@pytest.mark.parametrize("given", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"compression": "deflate"}])
@pytest.mark.parametrize("value", ["-9999", "0", "-3.4028234663852886e+38", "65535 ", "nan"])
def test_nodata_tag_is_read(tmp_path, given, value):
    tifffile.imwrite(tmp_path / "a.tif", terrain(0), **tag(value), **given)
    found = nodata_module.declared((tmp_path / "a.tif").read_bytes())
    assert found == float(value) or (value == "nan" and np.isnan(found))


def test_nodata_is_none_without_a_numeric_tag(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", terrain(0))
    assert nodata_module.declared((tmp_path / "a.tif").read_bytes()) is None
    tifffile.imwrite(tmp_path / "b.tif", terrain(0), **tag("none of these"))
    data = (tmp_path / "b.tif").read_bytes()
    assert nodata_module.declared(data) is None
    assert all(nodata_module.declared(data[:length]) is None for length in range(0, len(data), 97))
    assert nodata_module.declared(b"\x89PNG") is None


@pytest.mark.parametrize(
    ("dtype", "value", "channels"),
    [("uint8", 0, 3), ("uint16", 65535, 1), ("uint16", 0, 4), ("int16", -32768, 1), ("int32", -9999, 1)],
)
def test_nodata_value_is_found_in_integers_of_every_width(tmp_path, dtype, value, channels):
    pixels = np.random.default_rng(0).integers(1, 200, (20, 24, channels)).astype(dtype)
    pixels[3:6, 2:9] = value
    pixels[0, 0, 0] = value  # a value in only one of several channels is an ordinary colour
    tifffile.imwrite(tmp_path / "a.tif", pixels.squeeze(), photometric="rgb" if channels == 3 else "minisblack",
                     planarconfig="contig" if channels > 1 else None, **tag(str(value)))  # fmt: skip
    data = (tmp_path / "a.tif").read_bytes()
    valid = nodata_module.valid_pixels(decode.decode(data), "auto", nodata_module.declared(data))
    assert (~valid).sum() == 3 * 7 + (channels == 1)
    assert not valid[3:6, 2:9].any()


def test_nan_is_absent_unless_nodata_is_none():
    pixels = terrain(0, missing=np.nan)[:, :, None]
    assert (~nodata_module.valid_pixels(pixels, "auto", None)).sum() == 22 * 24
    with pytest.raises(BadImage, match=r"NaN.*data\.nodata=auto"):
        nodata_module.valid_pixels(pixels, None, None)
    whole = terrain(0, hole=False)[:, :, None]
    assert nodata_module.valid_pixels(whole, "auto", None) is None
    assert nodata_module.valid_pixels(whole, "auto", -9999) is None


def test_values_beyond_float32_are_absent(tmp_path):
    heights = terrain(0, hole=False).astype(np.float64)
    heights[:4] = -1.7976931348623157e308  # a common no-data value in float64 rasters
    np.save(tmp_path / "a.npy", heights)
    pixels = decode.decode((tmp_path / "a.npy").read_bytes())
    assert (~nodata_module.valid_pixels(pixels, "auto", None)).sum() == 4 * 48


def test_nodata_setting_adds_a_value_or_turns_detection_off():
    pixels = terrain(0)[:, :, None]
    assert nodata_module.valid_pixels(pixels, "auto", None) is None
    assert (~nodata_module.valid_pixels(pixels, -9999, None)).sum() == 22 * 24
    assert nodata_module.valid_pixels(pixels, None, -9999) is None
    assert nodata_module.valid_pixels(np.zeros((2, 2, 1), np.uint8), -9999, 1e40) is None


@pytest.mark.parametrize("kind", ["tag", "nan", "setting"])
@pytest.mark.parametrize("workers", [0, 1])
def test_statistics_exclude_absent_pixels(tmp_path, kind, workers):
    if kind == "nan":
        for number in range(10):
            np.save(tmp_path / f"{number}.npy", terrain(number, hole=number % 2 == 0, missing=np.nan))
        folder = tmp_path
    else:
        folder = write(tmp_path / "terrain", **(tag("-9999") if kind == "tag" else {}))
    source = apply_reading(open_source(str(folder)), Reading(nodata=-9999 if kind == "setting" else "auto"))
    found = scan(source, workers=workers)
    assert found.mean == pytest.approx([250], abs=1)
    assert found.std == pytest.approx([60], abs=1)
    assert found.absent_share == pytest.approx(0.5 * 22 * 24 / (40 * 48))
    assert (found.good, found.absent_files, found.empty_files) == (10, 5, 0)
    assert "13.7% of all pixels, in 5 of 10 files" in findings(found)[0]


def test_values_are_used_as_data_without_the_tag(tmp_path):
    found = scan(open_source(str(write(tmp_path / "terrain"))), workers=0)
    assert found.mean[0] < -500
    assert found.absent_files == 0
    assert not findings(found)


def test_scan_cache_depends_on_the_nodata_setting(tmp_path, monkeypatch):
    folder = write(tmp_path / "terrain")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "memory"))
    monkeypatch.setattr(scan_cache, "WORTH_KEEPING", -1.0)
    monkeypatch.setattr(scan_cache, "COARSEST_CLOCK", -3600 * 10**9)
    with_value, without = (apply_reading(open_source(str(folder)), Reading(nodata=value)) for value in (-9999, "auto"))
    first, again = scan(with_value, workers=0), scan(with_value, workers=0)
    assert (again.known, again.mean, again.absent_share) == (10, first.mean, first.absent_share)
    other = scan(without, workers=0)
    assert other.known == 0
    assert other.mean[0] < -500


def test_runs_of_earlier_versions_ignore_the_nodata_tag(tmp_path):
    folder = write(tmp_path / "terrain", **tag("-9999"))
    found = scan(apply_reading(open_source(str(folder)), EARLIER), workers=0)
    assert found.mean[0] < -500
    assert found.absent_files == 0


def test_files_without_any_valid_pixel_are_counted(tmp_path):
    folder = write(tmp_path / "terrain", **tag("-9999"))
    tifffile.imwrite(folder / "empty.tif", np.full((40, 48), -9999, np.float32), **tag("-9999"))
    found = scan(open_source(str(folder)), workers=0)
    assert found.empty_files == 1
    assert found.mean == pytest.approx([250], abs=1)
    assert "1 file without any valid pixel" in findings(found)[1]


def whole(size: tuple[int, int]) -> np.ndarray:
    return np.array([0.0, 0.0, *size])


@pytest.mark.parametrize("target", [(16, 16), (40, 48), (90, 100)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resampling_excludes_absent_pixels(target, interpolation):
    image = np.full((40, 48, 2), 100.0, np.float32)
    valid = np.ones((40, 48), bool)
    valid[8:30, 12:36] = False
    image[~valid] = -9999
    pixels, there = augment.cut_valid(image, valid, np.float32([7, 8]), whole((40, 48)), target, False, interpolation)
    assert np.allclose(pixels[there], 100, atol=1e-3)
    assert (pixels[~there] == [7, 8]).all()
    assert there.mean() == pytest.approx(valid.mean(), abs=0.06)
    turned, there_turned = augment.cut_valid(
        image, valid, np.float32([7, 8]), whole((40, 48)), target, True, interpolation
    )
    assert np.array_equal(turned, pixels[:, ::-1])
    assert np.array_equal(there_turned, there[:, ::-1])


def test_resampling_without_absent_pixels_agrees_with_cut():
    image = terrain(0, hole=False)[:, :, None]
    plain = augment.cut(image, whole((40, 48)), (16, 16), False)
    pixels, there = augment.cut_valid(
        image, np.ones((40, 48), bool), np.float32([250]), whole((40, 48)), (16, 16), False
    )
    assert there.all()
    assert np.allclose(pixels, plain, atol=1e-3)


def batch_of(folder: Path, *, spec: ImageSpec = SPEC, epoch: int = 0, nodata: Nodata = "auto", **given) -> Batch:
    source = apply_reading(open_source(str(folder)), Reading(nodata=nodata))
    images = ImageReader(source, np.arange(10), spec, CropConfig(), **given)
    return images[SampleIndices(np.arange(10), np.full(10, epoch))].batch


@pytest.mark.parametrize("training", [True, False])
def test_loader_fills_absent_pixels_with_the_mean_and_marks_them(tmp_path, training):
    batch = batch_of(write(tmp_path / "terrain", **tag("-9999")), training=training)
    assert batch.valid.shape == (10, 16, 16)
    assert batch.valid[1::2].all()
    assert 0 < batch.valid[::2].float().mean() < 1
    assert (batch.images[:, 0][~batch.valid] == 250).all()
    assert batch.images.min() > 250 - 6 * 60
    part = batch[2:4]
    assert part.valid.shape == (2, 16, 16)
    joined = Batch.join([batch_of(write(tmp_path / "plain"), spec=SPEC, nodata=None), batch])
    assert joined.valid[:10].all()
    assert torch.equal(joined.valid[10:], batch.valid)


def test_cached_images_with_absent_pixels_give_the_same_batches(tmp_path):
    source = open_source(str(write(tmp_path / "terrain", **tag("-9999"))))
    fresh, kept = (ImageReader(source, np.arange(10), SPEC, CropConfig()) for _ in range(2))
    kept.keep_decoded()
    taken = SampleIndices(np.arange(10), np.full(10, 3))
    one, other = fresh[taken].batch, kept[taken].batch
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.valid, other.valid)


def test_images_without_absent_pixels_are_read_alike_with_and_without_the_nodata_tag(tmp_path):
    plain, tagged = write(tmp_path / "plain", count=0), write(tmp_path / "tagged", count=0)
    for number in range(10):
        tifffile.imwrite(plain / f"{number}.tif", terrain(number, hole=False))
        tifffile.imwrite(tagged / f"{number}.tif", terrain(number, hole=False), **tag("-9999"))
    one, other = batch_of(plain, nodata=None), batch_of(tagged)
    assert one.valid is other.valid is None
    assert torch.equal(one.images, other.images)


def test_absent_pixels_agree_between_loader_and_device(tmp_path):
    folder = write(tmp_path / "colour", count=0)
    for number in range(10):
        pixels = np.random.default_rng(number).integers(20, 200, (40, 48, 3), np.uint8)
        pixels[8:30, 12:36] = 0
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="rgb", **(tag("0") if number % 2 else {}))
    spec = ImageSpec(3, (16, 16), "uint8", (100.4, 110.0, 120.0), (50.0, 50.0, 50.0))
    here, there = batch_of(folder, spec=spec), to_device(batch_of(folder, spec=spec, on_device=True), "cpu")
    assert torch.equal(here.valid, there.valid)
    assert torch.equal(here.images[1::2], there.images[1::2])
    assert (here.images.movedim(1, -1)[~here.valid] == torch.tensor([100, 110, 120])).all()
    images = ImageReader(open_source(str(folder)), np.arange(10), spec, CropConfig(jitter=0.5))
    jittered = images[SampleIndices(np.arange(10), np.zeros(10, np.int64))].batch
    assert (jittered.images.movedim(1, -1)[~jittered.valid] == torch.tensor([100, 110, 120])).all()


class Maps:
    rows = np.arange(10)

    def cut(self, row, size, box, target, flip):
        return {"maps": np.ones(target, np.int64)}


def test_absent_pixels_are_ignored_in_segmentation_masks(tmp_path):
    batch = batch_of(write(tmp_path / "terrain", **tag("-9999")), annotations=Maps())
    assert (batch.maps[~batch.valid] == IGNORED).all()
    assert (batch.maps[batch.valid] == 1).all()


def test_packed_copies_preserve_absent_pixels(tmp_path):
    folder = write(tmp_path / "terrain", count=0)
    large = np.kron(terrain(0), np.ones((4, 4), np.float32))
    tifffile.imwrite(folder / "a.tif", large, **tag("-9999"))
    tifffile.imwrite(folder / "b.tif", (large + 20_000).astype(np.uint16), **tag("10001"))
    source = open_source(str(folder))
    small = decode.decode(pack_image(source, 0, 40, 90).data)
    valid = nodata_module.valid_pixels(small, "auto", None)
    assert valid.mean() == pytest.approx(1 - 22 * 24 / (40 * 48), abs=0.03)
    assert small[valid].mean() == pytest.approx(250, abs=2)
    assert small[valid].min() > 0
    assert pack_image(source, 1, 40, 90).data == source.read(1), "integer pixels are only marked as absent by the tag"


def test_nodata_is_none_if_the_directory_offset_is_invalid():
    assert nodata_module.declared(b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(16)) is None
