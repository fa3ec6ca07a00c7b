"""Decoding: every kind of file keeps its values, and damaged files raise an error instead of giving an image."""

import builtins
import io
import resource
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus import (
    bad_files,
    chunk,
    damaged,
    file_of,
    jpeg_claiming,
    noisy,
    npy,
    photographs,
    png,
    png16,
    smooth,
    tiff,
)
from PIL import Image

from unmask.data import limits
from unmask.data.decode import decode as decode_module
from unmask.data.decode import jpeg
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.decode import decode, header
from unmask.data.decode.image_header import Header
from unmask.data.decode.pixels import conform

BAD = bad_files()


def code_of(data):
    with pytest.raises(BadImage) as caught:
        decode(data)
    return caught.value.code


def agreed(data):
    """Return the decoded image after checking that it matches the header."""
    found, pixels = header(data), decode(data)
    assert pixels.shape == (found.height, found.width, found.channels)
    assert pixels.dtype == found.dtype
    assert pixels.flags.c_contiguous
    return pixels


def test_corpus_has_the_expected_number_of_bad_files():
    assert len(BAD) >= 40


@pytest.mark.parametrize("name", BAD)
def test_bad_file_raises_its_reason_code(name):
    data, expected = BAD[name]
    start = time.monotonic()
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.code == expected, str(caught.value)
    assert caught.value.detail
    assert time.monotonic() - start < 10


def test_every_reason_code_is_documented():
    for _, code in BAD.values():
        assert code in (decode_module.__doc__ or "")


def test_files_with_huge_declared_sizes_use_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (data, code) in BAD.items():
        if code in ("TOO_MANY_PIXELS", "EXTREME_ASPECT") or name.startswith("lying"):
            assert code_of(data) == code
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 64 << 20


def test_npy_with_python_objects_is_rejected_without_running_code():
    assert code_of(BAD["object.npy"][0]) == "UNSUPPORTED_MODE"
    assert code_of(BAD["pickle.npy"][0]) == "NOT_IMAGE"
    assert not Path("/tmp/unmask-was-unpickled").exists()


def test_file_above_the_byte_limit_is_rejected(monkeypatch):
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100)
    assert code_of(b"\xff\xd8" + b"\0" * 99) == "TOO_LARGE_FILE"


def test_image_with_too_many_values_is_rejected():
    values = npy(np.zeros((1, 1, 1), np.uint8)).replace(b"(1, 1, 1)", b"(9999, 9999, 5)")
    assert code_of(values) == "TOO_MANY_PIXELS"


def test_out_of_memory_gives_a_reason_code(monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", full)
    assert code_of(file_of(smooth(), "JPEG")) == "TOO_MANY_PIXELS"


SOUND = {
    "jpeg": file_of(noisy(), "JPEG"),
    "png": file_of(noisy(), "PNG"),
    "palette": file_of(Image.fromarray(noisy()).convert("P"), "PNG"),
    "png16": png16(noisy(dtype=np.uint16)),
    "webp": file_of(noisy(), "WEBP"),
    "gif": file_of(noisy(), "GIF"),
    "bmp": file_of(noisy(), "BMP"),
    "tiff": file_of(noisy(), "TIFF"),
    "lzw": file_of(noisy(), "TIFF", compression="tiff_lzw"),
    "bands": tiff(noisy(channels=5), photometric="minisblack", planarconfig="contig"),
    "bigtiff": tiff(noisy(dtype=np.uint16), bigtiff=True, compression="zlib"),
    "npy": npy(noisy()),
}


@pytest.mark.parametrize("kind", SOUND)
def test_random_damage_gives_a_bad_image_or_an_image_that_matches_its_header(kind):
    rng, data = np.random.default_rng(7), SOUND[kind]
    agreed(data)
    codes = set()
    for trial in range(120):
        bytes_ = bytearray(data)
        for _ in range(int(rng.integers(1, 6))):
            bytes_[int(rng.integers(0, len(bytes_) if trial % 2 else min(200, len(bytes_))))] = int(
                rng.integers(0, 256)
            )
        cut = int(rng.integers(0, len(bytes_))) if trial % 5 == 0 else len(bytes_)
        try:
            agreed(bytes(bytes_[:cut]))
        except BadImage as error:
            codes.add(error.code)
    assert codes
    assert all(code in (decode_module.__doc__ or "") for code in codes)


@pytest.mark.parametrize("kind", ["png", "palette", "png16"])
def test_any_changed_byte_of_a_png_is_detected(kind):
    data = SOUND[kind]
    for place in np.linspace(0, len(data) - 1, 150).astype(int):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(BadImage):
            decode(bytes(flipped))


@pytest.mark.parametrize("kind", ["jpeg", "png", "palette", "png16", "webp", "bmp", "tiff", "bands", "npy"])
def test_any_truncation_is_detected(kind):
    for share in (0.05, 0.3, 0.6, 0.9, 0.98):
        with pytest.raises(BadImage):
            decode(SOUND[kind][: int(len(SOUND[kind]) * share)])


def test_trailing_bytes_are_ignored():
    for kind in ("jpeg", "png", "png16", "npy"):
        assert (decode(SOUND[kind] + b"\0" * 500) == decode(SOUND[kind])).all()


def test_jpeg_is_decoded_closely_and_gray_stays_gray():
    assert np.abs(agreed(file_of(smooth(), "JPEG", quality=98)).astype(int) - smooth()).max() < 12
    assert header(file_of(smooth(channels=1), "JPEG")) == Header(48, 64, 1, "uint8", "JPEG")
    assert agreed(file_of(smooth(), "JPEG", progressive=True)).shape == (48, 64, 3)


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.fromarray(smooth()).convert("CMYK")
    assert np.abs(agreed(file_of(cmyk, "JPEG", quality=98)).astype(int) - smooth()).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown, options = smooth(), {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(kind, {})
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # converts displayed to stored pixels
    stored = Image.fromarray(shown)
    stored = stored if undo is None else stored.transpose(Image.Transpose(undo))
    pixels = agreed(file_of(stored, kind, exif=exif, **options))
    assert pixels.shape == shown.shape
    assert np.abs(pixels.astype(int) - shown).max() < 12


def test_orientation_of_bands_is_applied():
    values = noisy(10, 20, 5)
    turned = tiff(values, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)])
    assert (agreed(turned) == np.rot90(values, -1)).all()


def test_orientation_of_a_16_bit_png_is_applied():
    values = noisy(10, 20, 3, np.uint16)
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    assert (agreed(png16(values, before=chunk(b"eXIf", exif))) == np.rot90(values, -1)).all()


def test_invalid_exif_is_ignored():
    for exif in (b"", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\x01", b"nonsense"):
        data = file_of(smooth(), "JPEG")
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
        assert agreed(data[:2] + segment + data[2:]).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("wanted", "factor"), [((600, 800), 1), ((301, 100), 1), ((300, 400), 2), ((76, 4), 4), ((9, 9), 8)]
)
def test_jpeg_is_decoded_at_the_smallest_sufficient_scale(wanted, factor):
    data = file_of(Image.fromarray(smooth()).resize((800, 600)), "JPEG", quality=95)
    scaled = decode(data, at_least=wanted)
    assert scaled.shape == (600 // factor, 800 // factor, 3)
    full = decode(data).reshape(600 // factor, factor, 800 // factor, factor, 3).mean((1, 3))
    assert np.abs(scaled - full).mean() < 1.5


def test_odd_sizes_are_scaled_and_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(smooth(101, 203)), "JPEG", exif=exif)
    assert decode(data).shape == (203, 101, 3)
    assert decode(data, at_least=(102, 51)).shape == (102, 51, 3)
    assert decode(data, at_least=(103, 51)).shape == (203, 101, 3)


def test_reduced_size_decoding_only_affects_jpeg():
    assert decode(SOUND["png"], at_least=(1, 1)).shape == (48, 64, 3)


def test_photographs_decode_like_in_pillow():
    for data in photographs():
        pixels = agreed(data)
        image = Image.open(io.BytesIO(data))
        pillow = np.asarray(image.convert("RGB" if pixels.shape[2] == 3 else "L"))
        assert np.abs(pixels.reshape(pillow.shape).astype(int) - pillow).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_keep_every_value(kind, channels):
    assert (agreed(file_of(noisy(channels=channels), kind)) == noisy(channels=channels)).all()


def test_webp_keeps_every_value():
    assert (agreed(file_of(noisy(), "WEBP", lossless=True)) == noisy()).all()


def test_interlaced_png_is_read():
    rows = b"\0\x07\0\x08\0\x09"  # rows of a 2 x 2 gray image in passes 1, 6 and 7
    assert agreed(png(2, 2, 8, 0, b"\0\x07\0\x08\0\x09\x0a", interlace=1))[:, :, 0].tolist() == [[7, 8], [9, 10]]
    assert code_of(png(2, 2, 8, 0, rows, interlace=1)) in ("TRUNCATED", "CORRUPT")


def test_black_images_are_not_mistaken_for_missing_rows():
    for mode in ("1", "L", "RGB", "P"):
        assert not agreed(file_of(Image.new(mode, (33, 17)), "PNG")).any()
    assert not agreed(png16(np.zeros((17, 33, 3), np.uint16))).any()


def test_alpha_is_composited_on_white():
    rgba = np.concatenate([smooth(), np.full((48, 64, 1), 0, np.uint8)], 2)
    rgba[:, 32:, 3] = 255
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        pixels = agreed(file_of(rgba, kind, **options))
        assert (pixels[:, :32] == 255).all()
        assert (pixels[:, 32:] == rgba[:, 32:, :3]).all()


def test_gray_with_alpha_stays_gray():
    image = Image.merge("LA", [Image.new("L", (9, 9), 100), Image.new("L", (9, 9), 0)])
    assert (agreed(file_of(image, "PNG")) == 255).all()
    assert agreed(file_of(image, "PNG")).shape == (9, 9, 1)


def test_palettes_become_rgb_with_transparency_on_white():
    image = Image.new("P", (8, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (agreed(file_of(image, "PNG")) == [10, 20, 30]).all()
    assert (agreed(file_of(image, "PNG", transparency=1)) == 255).all()
    assert (agreed(file_of(image, "TIFF")) == [10, 20, 30]).all()


def test_a_transparent_colour_without_alpha_becomes_white():
    assert (agreed(file_of(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == 255).all()
    assert (agreed(file_of(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255).all()
    gray, rgb = np.full((3, 3, 1), 700, np.uint16), np.full((3, 3, 3), 700, np.uint16)
    assert (agreed(png16(gray, before=chunk(b"tRNS", struct.pack(">H", 700)))) == 65535).all()
    assert (agreed(png16(rgb, before=chunk(b"tRNS", struct.pack(">3H", 700, 700, 700)))) == 65535).all()
    assert (agreed(png16(rgb, before=chunk(b"tRNS", struct.pack(">3H", 700, 700, 701)))) == 700).all()


def test_one_bit_images_become_0_and_255():
    bits = noisy(channels=1) > 127
    for kind in ("PNG", "BMP", "TIFF"):
        pixels = agreed(file_of(Image.fromarray(bits[:, :, 0]), kind))
        assert (pixels == bits * np.uint8(255)).all()


def test_first_frame_of_a_gif_is_read():
    frames = [Image.new("RGB", (12, 10), (90 * i, 0, 0)) for i in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    for kind, options in (("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        assert not agreed(file_of(frames[0], kind, **more, **options)).any()


def test_cmyk_tiff_becomes_rgb():
    assert np.abs(agreed(file_of(Image.fromarray(smooth()).convert("CMYK"), "TIFF")).astype(int) - smooth()).max() < 3


def test_compressed_tiff_is_read():
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        assert (agreed(file_of(noisy(), "TIFF", compression=compression)) == noisy()).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("filters", [False, True])
def test_16_bit_png_keeps_every_value(channels, filters):
    values = noisy(20, 30, channels, np.uint16)
    assert (agreed(png16(values, filters=filters)) == values).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bit_png_with_alpha_is_composited_on_white(channels):
    values = noisy(20, 30, channels, np.uint16)
    values[:5, :, -1], values[5:, :, -1] = 0, 65535
    pixels = agreed(png16(values, filters=True))
    assert (pixels[:5] == 65535).all()
    assert (pixels[5:] == values[5:, :, :-1]).all()


def test_large_16_bit_png_is_decoded_as_fast_as_8_bit():
    values = smooth(1000, 1000, 3, top=65535)
    start = time.monotonic()
    assert (decode(png16(values, filters=True)) == values).all()
    assert time.monotonic() - start < 5


def test_16_bit_gray_is_not_saturated():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    for kind in ("PNG", "TIFF"):
        assert (agreed(file_of(Image.fromarray(ramp), kind))[:, :, 0] == ramp).all()
    assert (agreed(tiff(ramp.astype(">u2"), byteorder=">"))[:, :, 0] == ramp).all()


def test_min_is_white_tiff_is_inverted():
    gray8, gray16 = noisy(channels=1)[:, :, 0], noisy(channels=1, dtype=np.uint16)[:, :, 0]
    assert (agreed(tiff(gray8, photometric="miniswhite"))[:, :, 0] == 255 - gray8).all()
    assert (agreed(tiff(gray16, photometric="miniswhite"))[:, :, 0] == 65535 - gray16).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "int16", "int32", "uint32"])
def test_other_number_types_become_float32_with_the_same_values(dtype):
    values = (np.linspace(0, 1, 63) * (1 if dtype.startswith("f") else 100)).astype(dtype).reshape(7, 9)
    for data in (npy(values), tiff(values)):
        pixels = agreed(data)
        assert pixels.dtype == np.float32
        assert (pixels[:, :, 0] == values.astype(np.float32)).all()


def test_unsigned_32_bit_values_stay_positive():
    assert agreed(tiff(np.full((4, 4), 3_000_000_000, np.uint32))).min() == np.float32(3e9)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [2, 3, 5, 12])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_many_bands_keeps_every_value(dtype, channels, planar):
    values = noisy(20, 30, channels, np.uint8).astype(dtype)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    pixels = agreed(tiff(stored, photometric="minisblack", planarconfig=planar))
    assert (pixels == values).all()


def test_16_bit_rgb_tiff_keeps_every_value():
    values = noisy(dtype=np.uint16)
    for options in ({}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}, {"bigtiff": True}):
        assert (agreed(tiff(values, photometric="rgb", **options)) == values).all()


def test_a_fourth_band_that_is_not_alpha_is_kept():
    values = noisy(channels=4)
    assert (agreed(tiff(values, photometric="rgb", extrasamples=["unspecified"])) == values).all()
    assert (agreed(tiff(values, photometric="rgb", extrasamples=["unassalpha"])) == values).all()


def test_alpha_of_a_16_bit_tiff_is_composited_on_white():
    values = noisy(channels=4, dtype=np.uint16)
    values[..., 3] = 0
    assert (agreed(tiff(values, photometric="rgb", extrasamples=["unassalpha"])) == 65535).all()


def test_bands_without_tifffile_are_rejected_with_the_fix(monkeypatch):
    true_import = builtins.__import__

    def absent(name, *arguments, **more):
        if name == "tifffile":
            raise ImportError(name)
        return true_import(name, *arguments, **more)

    data = tiff(noisy(dtype=np.uint16), photometric="rgb")
    monkeypatch.delitem(sys.modules, "tifffile", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(BadImage, match=r"unmask\[tiff\]") as caught:
        decode(data)
    assert caught.value.code == "UNSUPPORTED_MODE"
    assert decode(SOUND["tiff"]).shape == (48, 64, 3)  # an ordinary TIFF does not need tifffile


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 3), (9, 7, 12)])
def test_npy_keeps_every_value(shape):
    for dtype in (np.uint8, np.uint16, ">u2", np.float32, "<f8"):
        values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        for order in ("C", "F"):
            pixels = agreed(npy(np.asarray(values, order=order)))
            assert (pixels == values.reshape(9, 7, -1)).all()


def test_npy_with_channels_first_is_transposed():
    values = noisy(7, 9, 5)
    assert (agreed(npy(values.transpose(2, 0, 1))) == values).all()


def test_npy_of_booleans_becomes_0_and_255():
    assert set(np.unique(agreed(npy(noisy(channels=1)[:, :, 0] > 127)))) == {0, 255}


def test_npy_of_wide_integers_becomes_float32_for_any_values():
    for values in ([[0, 1]], [[-1, 70000]]):
        assert agreed(npy(np.array(values, np.int64))).dtype == np.float32


def test_conform_only_converts_without_loss():
    gray, rgb = noisy(channels=1), noisy()
    assert (conform(gray, 3, "uint8") == gray).all()
    assert conform(rgb, 3, "uint8") is rgb
    assert (conform(gray, 1, "uint16") == gray.astype(int) * 257).all()
    luma = conform(rgb, 1, "uint8")
    assert luma.shape == (48, 64, 1)
    assert np.abs(luma - (rgb @ [0.299, 0.587, 0.114])[:, :, None]).max() <= 0.51


@pytest.mark.parametrize(
    ("pixels", "channels", "dtype", "code"),
    [
        (noisy(channels=5), 3, "uint8", "MISMATCHED_CHANNELS"),
        (noisy(channels=2), 1, "uint8", "MISMATCHED_CHANNELS"),
        (noisy(dtype=np.uint16), 3, "uint8", "MISMATCHED_DTYPE"),
        (noisy(), 3, "float32", "MISMATCHED_DTYPE"),
        (noisy(), 1, "float32", "MISMATCHED_DTYPE"),
        (noisy().astype(np.float32), 3, "uint8", "MISMATCHED_DTYPE"),
        (noisy().astype(np.float32), 1, "uint16", "MISMATCHED_DTYPE"),
    ],
)
def test_conform_rejects_other_channel_counts_and_dtypes(pixels, channels, dtype, code):
    with pytest.raises(BadImage) as caught:
        conform(pixels, channels, dtype)
    assert caught.value.code == code


def test_dark_16_bit_colour_stays_dark_as_gray():
    assert (conform(np.full((3, 3, 3), 100, np.uint16), 1, "uint16") == 100).all()


def test_bad_image_can_be_pickled():
    import pickle

    error = pickle.loads(pickle.dumps(BadImage("EMPTY", "nothing")))
    assert (error.code, error.detail, str(error)) == ("EMPTY", "nothing", "EMPTY: nothing")


def test_header_above_the_limits_is_rejected_before_decoding():
    with pytest.raises(BadImage):
        header(jpeg_claiming(65500, 65500))
    assert header(damaged(SOUND["jpeg"], 0.9, 3)).height == 48
