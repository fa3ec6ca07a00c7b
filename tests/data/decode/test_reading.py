"""Alpha, pages and axes: no channel is dropped or mixed silently, and settings override the defaults."""

import builtins
import struct
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from conftest import pretrain
from corpus import file_of, noisy, npy, png16, tiff
from PIL import Image

from unmask.config import DataConfig
from unmask.console import Console
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.decode import decode, header
from unmask.data.decode.layout import ALPHA, AXES, PAGES, TOLERATED, Layout
from unmask.data.decode.reading import EARLIER, Reading
from unmask.data.decode.tiff_pages import MOST_ENTRIES
from unmask.data.scan.findings import file_kinds, findings, is_plain
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.tiff_samples import TiffPagesSource, apply_reading
from unmask.engine import training_data
from unmask.engine.check_data import print_table


def photo(channels=4, seed=0, height=48, width=64):
    """Return values between 20 and 230, which occur in a band of data but not in an alpha channel."""
    return (noisy(height, width, channels, seed=seed).astype(int) * 210 // 255 + 20).astype(np.uint8)


def rgba(seed=0):
    image = photo(seed=seed)
    image[..., 3] = 255
    image[:20, :20, 3] = 0
    return image


def on_white(image):
    alpha = image[..., 3:] / 255
    return np.round(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def agreed(data, **settings):
    reading = Reading(**settings)
    found, pixels = header(data, reading), decode(data, reading=reading)
    assert pixels.shape == (found.height, found.width, found.channels)
    assert pixels.dtype == found.dtype
    assert (decode(data, found=found) == pixels).all()
    return pixels


def pages_tiff(path, *pages, **options):
    with tifffile.TiffWriter(path, **options) as file:
        for values, more in pages:
            file.write(values, **more)
    return path.read_bytes()


def bmp_with_alpha(image):
    """Return a BMP whose header has an alpha mask but whose alpha is 0, as some programs write it."""
    height, width, _ = image.shape
    pixels = image[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII4I", 108, width, height, 1, 32, 3, len(pixels), 0, 0, 0, 0, *masks).ljust(
        108, b"\0"
    )
    return b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + head + pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", [False, True])
def test_a_band_of_data_tagged_as_alpha_is_kept(dtype, planar):
    values = photo().astype(dtype) * (40 if dtype == np.uint16 else 1)
    stored = values.transpose(2, 0, 1).copy() if planar else values
    options = {"planarconfig": "separate" if planar else "contig", "extrasamples": ["unassalpha"]}
    assert (agreed(tiff(stored, photometric="rgb", **options)) == values).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_two_radar_bands_tagged_as_alpha_are_both_kept(dtype):
    values = photo(2).astype(dtype)
    data = tiff(values, photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig")
    assert (agreed(data) == values).all()


def test_real_alpha_is_composited():
    image = rgba()
    for data in (
        file_of(image, "PNG"),
        file_of(image, "TIFF"),
        file_of(image, "WEBP", lossless=True, exact=True),
        tiff(image, photometric="rgb", extrasamples=["unassalpha"]),
    ):
        pixels = agreed(data)
        assert (pixels == on_white(image)).all()
        assert (pixels == agreed(data, **EARLIER.model_dump())).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP"])
def test_alpha_setting_is_applied(kind):
    image = rgba()
    data = (
        bmp_with_alpha(image)
        if kind == "BMP"
        else file_of(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    )
    assert (agreed(data, alpha="composite") == on_white(image)).all()
    assert (agreed(data, alpha="drop") == image[..., :3]).all()
    assert (agreed(data, alpha="band") == image).all()
    uses = {use: header(data, Reading(alpha=use)).layout.alpha for use in ("composite", "drop", "band")}
    assert uses == {"composite": "composited", "drop": "dropped", "band": "band"}


def test_alpha_setting_applies_to_16_bit_and_premultiplied_alpha():
    values = noisy(channels=4, dtype=np.uint16)
    for data in (png16(values), tiff(values, photometric="rgb", extrasamples=["unassalpha"])):
        assert (agreed(data, alpha="drop") == values[..., :3]).all()
        assert (agreed(data, alpha="band") == values).all()
    small = tiff(rgba(), photometric="rgb", extrasamples=["assocalpha"])
    assert (agreed(small, alpha="band") == rgba()).all()


def test_alpha_setting_applies_to_gray_with_alpha():
    both = np.dstack([photo(1)[..., 0], np.where(np.arange(64) < 20, 0, 255).astype(np.uint8)[None].repeat(48, 0)])
    data = file_of(Image.fromarray(both, "LA"), "PNG")
    assert agreed(data).shape == (48, 64, 1)
    assert (agreed(data, alpha="drop") == both[..., :1]).all()
    assert (agreed(data, alpha="band") == both).all()


def test_a_bmp_with_an_alpha_of_zeros_is_opaque():
    image = photo()
    image[..., 3] = 0
    data = bmp_with_alpha(image)
    assert (agreed(data) == image[..., :3]).all()
    assert header(data).layout.alpha == "opaque"
    assert (agreed(bmp_with_alpha(rgba())) == on_white(rgba())).all()


def test_float_alpha_is_rejected_with_the_settings_that_fix_it():
    data = tiff(photo().astype(np.float32), photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(BadImage, match=r"data\.alpha=band"):
        header(data)
    assert agreed(data, alpha="band").shape == (48, 64, 4)


def test_alpha_tag_is_decided_once_for_a_data_set(tmp_path):
    for number in range(5):
        image = photo(seed=number)
        if number == 0:  # this file alone looks as if it had alpha
            image[..., 3] = 255
        (tmp_path / f"{number}.tif").write_bytes(tiff(image, photometric="rgb", extrasamples=["unassalpha"]))
    found = scan(open_source(tmp_path))
    assert (found.good, found.channels, found.reading.tagged) == (5, {4: 5}, "band")
    assert "kept as a band" in findings(found)[0]


@pytest.mark.parametrize("kind", ["imagej", "ome"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_are_channels_if_metadata_declares_them(kind, dtype):
    values = noisy(channels=5, dtype=np.uint16).astype(dtype)
    data = tiff(values.transpose(2, 0, 1).copy(), **{kind: True}, metadata={"axes": "CYX"})
    assert (agreed(data) == values).all()
    assert header(data).layout == Layout(1, pages=5, page_use="channels")
    assert (agreed(data, pages="first") == values[..., :1]).all()


@pytest.mark.parametrize("order", ["ZCYX", "CZYX"])
def test_channels_of_the_first_depth_are_read(order):
    volume = noisy(32, 40, 12, np.uint16).transpose(2, 0, 1).reshape(4, 3, 32, 40)  # Z, C
    stored = volume if order == "ZCYX" else volume.transpose(1, 0, 2, 3).copy()
    pixels = agreed(tiff(stored, ome=True, metadata={"axes": order}))
    assert (pixels == volume[0].transpose(1, 2, 0)).all()


def test_pages_without_metadata_are_counted_and_read_by_setting():
    values = noisy(channels=4)
    data = tiff(values.transpose(2, 0, 1).copy(), photometric="minisblack")
    assert (agreed(data) == values[..., :1]).all()
    assert header(data).layout == Layout(1, pages=4, page_use="first")
    assert (agreed(data, pages="channels") == values).all()


@pytest.mark.parametrize("reduced", [True, False])
def test_full_resolution_of_a_pyramid_is_read(tmp_path, reduced):
    full, level = noisy(), {"photometric": "rgb", "subfiletype": int(reduced)}
    main = {"photometric": "rgb"}
    data = pages_tiff(tmp_path / "a.tif", (full[::4, ::4].copy(), level), (full, main), (full[::2, ::2].copy(), level))
    assert (agreed(data) == full).all()
    assert header(data).layout == Layout(3, pages=1, page_use="largest")
    assert agreed(data, pages="first").shape == (12, 16, 3)
    below = pages_tiff(tmp_path / "b.ome.tif", (full, main | {"subifds": 1}), (full[::2, ::2].copy(), level))
    assert (agreed(below) == full).all()
    assert header(below).layout == Layout(3)


def test_pages_of_unrelated_sizes_are_not_a_pyramid(tmp_path):
    data = pages_tiff(tmp_path / "a.tif", (noisy(40, 30), {}), (noisy(50, 30), {}))
    assert agreed(data).shape == (40, 30, 3)
    assert header(data).layout.page_use == "first"


def test_every_page_can_be_a_separate_image(tmp_path):
    values = noisy(channels=5)
    (tmp_path / "stack.tif").write_bytes(tiff(values.transpose(2, 0, 1).copy(), photometric="minisblack"))
    (tmp_path / "one.png").write_bytes(file_of(values[..., :1], "PNG"))
    (tmp_path / "bad.tif").write_bytes(b"II*\0")
    source = apply_reading(open_source(tmp_path), Reading(pages="samples"))
    assert isinstance(source, TiffPagesSource)
    assert list(source.names) == ["bad.tif", "one.png", *(f"stack.tif#{number}" for number in range(1, 6))]
    found = scan(source)
    assert (found.good, len(found.bad)) == (6, 1)
    for page in range(5):
        assert (decode(source.read(2 + page), reading=source.reading)[..., 0] == values[..., page]).all()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((40, 60, 100), (40, 60, 100)),  # hyperspectral, with a height smaller than the other axes
        ((145, 145, 200), (145, 145, 200)),
        ((224, 128, 128), (128, 128, 224)),  # square images with many bands
        ((64, 200, 200), (200, 200, 64)),
        ((5, 60, 100), (60, 100, 5)),
        ((60, 100, 5), (60, 100, 5)),
        ((12, 64, 64), (64, 64, 12)),
        ((3, 60, 100), (60, 100, 3)),
    ],
)
def test_order_of_axes_is_chosen_by_shape_and_setting(shape, size):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert agreed(npy(values)).shape == size
    assert (agreed(npy(values), axes="HWC") == values).all()
    assert (agreed(npy(values), axes="CHW") == values.transpose(1, 2, 0)).all()


def test_axis_with_the_same_length_in_all_files_is_the_channel_axis(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.zeros((30, 40 + number, 40 + number), np.float32) + number)
    found = scan(open_source(tmp_path))
    assert found.reading.axes == "CHW"
    assert found.channels == {30: 4}
    assert "the same length in all" in findings(found)[0]


def test_guessed_axes_are_reported(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).random((20, 30, 50)))
    found = scan(open_source(tmp_path))
    assert (found.channels, found.median_size) == ({50: 3}, (20, 30))
    assert "a guess" in findings(found)[0]
    assert "data.axes=CHW" in findings(found)[0]


def test_plan_stores_the_reading_for_later_commands(tmp_path, monkeypatch, capsys):
    from conftest import SMALL_RUN

    from unmask.evals import embed_images

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        values = photo(seed=number)
        (folder / f"{number}.tif").write_bytes(tiff(values, photometric="rgb", extrasamples=["unassalpha"]))
    run = pretrain(folder, recipe="mae_nano", out=tmp_path / "run", settings=(*SMALL_RUN, "train.steps=1"))
    plan = run.read("plan.json")
    assert (plan["images"]["channels"], plan["reading"]["tagged"]) == (4, "band")
    assert any("10 TIFF files: alpha is kept as a band" in reason for reason in plan["reasons"])
    one = tmp_path / "one"  # this file alone would be read as having alpha
    one.mkdir()
    values = photo()
    values[..., 3] = 255
    (one / "a.tif").write_bytes(tiff(values, photometric="rgb", extrasamples=["unassalpha"]))
    done = embed_images.embed_images(
        run.path, str(one), tmp_path / "e.npz", step=None, device="cpu", console=Console(quiet=True)
    )
    assert (done.images, done.left_out) == (1, 0)
    with pytest.raises(training_data.DataError):
        pretrain(folder, recipe="mae_nano", settings=(*SMALL_RUN, "data.alpha=drop", "data.channels=4"))


def test_runs_of_earlier_versions_use_the_earlier_reading():
    from unmask.engine.training_plan import Plan

    assert Plan.model_fields["reading"].default == EARLIER
    data = tiff(photo(), photometric="rgb", extrasamples=["unassalpha"])
    assert agreed(data, **EARLIER.model_dump()).shape == (48, 64, 3)
    assert agreed(npy(np.zeros((40, 60, 100))), **EARLIER.model_dump()).shape == (60, 100, 40)


def test_reading_settings_match_the_configuration():
    assert DataConfig(alpha="band", pages="samples", axes="CHW").reading == Reading(
        alpha="band", pages="samples", axes="CHW"
    )


def test_file_kinds_are_tabulated_unless_all_are_plain(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(file_of(noisy(), "PNG"))
    assert is_plain(scan(open_source(tmp_path)))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(file_of(rgba(number), "PNG"))
    (tmp_path / "s.tif").write_bytes(tiff(noisy(channels=4).transpose(2, 0, 1).copy(), photometric="minisblack"))
    found = scan(open_source(tmp_path))
    rows = file_kinds(found)
    assert [(row.files, row.bands, row.alpha, row.pages, row.channels) for row in rows] == [
        (3, 4, "composited", 1, 3),
        (1, 3, "none", 1, 3),
        (1, 1, "none", 4, 1),
    ]
    print_table([vars(row) for row in rows], Console())
    assert "composited" in "".join(capsys.readouterr())
    assert any("only the first page is read" in sentence for sentence in findings(found))


def test_scan_cache_stores_layouts_for_each_reading(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unmask.data.scan.scan_cache.WORTH_KEEPING", 0.0)
    monkeypatch.setattr("unmask.data.scan.scan_cache.COARSEST_CLOCK", -(10**18))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(file_of(rgba(number), "PNG"))
    first, again = scan(open_source(folder)), scan(open_source(folder))
    assert (again.known, again.layouts) == (3, first.layouts)
    other = scan(apply_reading(open_source(folder), Reading(alpha="band")))
    assert (other.known, other.channels) == (0, {4: 3})


def test_layout_is_encoded_as_one_integer():
    for layout in (
        Layout(),
        Layout(7, "band", 12, "channels", "CHW", TOLERATED),
        *(Layout(3, alpha=alpha, page_use=embed, axes=axes) for alpha in ALPHA for embed in PAGES for axes in AXES),
    ):
        assert Layout.from_code(layout.code) == layout
    assert Layout.from_code(Layout(10**6, pages=10**6).code) == Layout(65535, pages=65535)


def test_cyclic_and_endless_directories_terminate():
    data = bytearray(file_of(noisy(), "TIFF"))
    place = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, place)[0]
    struct.pack_into("<I", data, place + 2 + 12 * entries, place)  # the directory gives itself as the next directory
    assert (agreed(bytes(data)) == noisy()).all()
    struct.pack_into("<H", data, place, MOST_ENTRIES + 1)
    with pytest.raises(BadImage) as caught:
        header(bytes(data) + b"\0" * 12 * MOST_ENTRIES)
    assert caught.value.code == "HEADER_BAD"


def test_missing_tifffile_is_reported_with_the_fix(monkeypatch):
    data = tiff(photo().astype(np.uint16), photometric="rgb", extrasamples=["unassalpha"])
    true_import = builtins.__import__

    def absent(name, *arguments, **more):
        if name == "tifffile":
            raise ImportError(name)
        return true_import(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, "tifffile", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(BadImage, match=r"pip install 'unmask\[tiff\]'"):
        header(data)
    plain = file_of(rgba(), "TIFF")
    assert agreed(plain).shape == (48, 64, 3)
    assert (agreed(plain, alpha="band") == rgba()).all()


@pytest.mark.parametrize("start", [b"II*\0\0\0\0\0", b"MM\0*\0\0\0\0" + bytes(40), b"II+\0\x08\0\0\0" + bytes(30)])
@pytest.mark.parametrize("pages", ["auto", "samples"])
def test_tiff_with_an_incomplete_directory_is_a_bad_file(tmp_path, start, pages):
    (tmp_path / "cut.tif").write_bytes(start)
    (tmp_path / "whole.tif").write_bytes(tiff(photo(3), photometric="rgb"))
    source = apply_reading(open_source(tmp_path), Reading(pages=pages))
    found = scan(source, workers=0)
    assert [(bad.name, bad.code) for bad in found.bad] == [("cut.tif", "TRUNCATED")]
    assert found.good == 1


def test_tifffile_warnings_about_tags_are_not_printed(tmp_path):
    data = tiff(np.zeros((8, 8, 5), np.uint16), photometric="minisblack", planarconfig="contig", software="a")
    assert struct.pack("<HH", 305, 2) in data
    (tmp_path / "a.tif").write_bytes(data.replace(struct.pack("<HH", 305, 2), struct.pack("<HH", 305, 999)))
    code = "import sys; from unmask.data.decode import decode; decode.decode(open(sys.argv[1], 'rb').read())"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tif"], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_other_images_are_read_with_the_reading_of_the_run():
    auto = DataConfig()
    assert auto.decided_settings(Reading(tagged="band")) == {"alpha": "band"}
    assert auto.decided_settings(Reading(tagged="alpha", axes="HWC")) == {"alpha": "composite", "axes": "HWC"}
    assert auto.decided_settings(Reading()) == auto.decided_settings(EARLIER) == {}
    asked = DataConfig(alpha="drop", axes="CHW")
    assert asked.decided_settings(Reading(tagged="band", axes="HWC")) == {}
