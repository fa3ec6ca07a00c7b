"""Limits on memory and time for one file, predicted from its header and enforced if the prediction is wrong."""

import resource
import struct
import sys

import numpy as np
import pytest
from corpus import Memory, file_of, noisy, npy, png, png16, smooth, tiff
from PIL import Image

from unmask.data import limits
from unmask.data.decode import decode as decode_module
from unmask.data.decode import tiff_pages
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.decode import decode, header, pieces
from unmask.data.decode.image_header import Header
from unmask.data.decode.limited_process import Crashed, TooSlow
from unmask.data.scan import scan as scanning
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.errors import SourceError

KINDS = {
    "jpeg": file_of(noisy(), "JPEG"),
    "progressive": file_of(noisy(), "JPEG", progressive=True),
    "png": file_of(noisy(), "PNG"),
    "rgba": file_of(noisy(channels=4), "PNG"),
    "gray alpha": file_of(Image.fromarray(noisy(channels=2), "LA"), "PNG"),
    "palette": file_of(Image.fromarray(noisy()).convert("P"), "PNG"),
    "transparent": file_of(Image.fromarray(noisy()).convert("P"), "PNG", transparency=3),
    "bits": file_of(Image.fromarray(noisy()).convert("1"), "PNG"),
    **{f"png16 {samples}": png16(noisy(channels=samples, dtype=np.uint16)) for samples in (1, 2, 3, 4)},
    "webp": file_of(noisy(), "WEBP"),
    "gif": file_of(noisy(), "GIF"),
    "bmp": file_of(noisy(), "BMP"),
    "tiff": file_of(noisy(), "TIFF", compression="tiff_lzw"),
    "white is zero": tiff(noisy(channels=1, dtype=np.uint16)[..., 0], photometric="miniswhite"),
    "bands": tiff(noisy(channels=5), photometric="minisblack", planarconfig="contig"),
    "float": file_of(Image.fromarray(noisy(channels=1)[..., 0].astype(np.float32)), "TIFF"),
    "pages": tiff(noisy(channels=3, dtype=np.uint16).transpose(2, 0, 1).copy(), imagej=True, metadata={"axes": "CYX"}),
    "npy": npy(noisy(channels=7).astype(np.float64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_joined_pieces_equal_the_decoded_image(kind, monkeypatch):
    data = KINDS[kind]
    whole = decode(data)
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)  # of seven rows
    parts = list(pieces(data, header(data)))
    assert len(parts) == 7
    assert (np.concatenate(parts) == whole).all()
    assert (decode(data) == whole).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pieces_are_not_rotated(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = file_of(smooth(), kind, exif=exif)
        assert np.concatenate(list(pieces(data, header(data)))).shape == (48, 64, 3)
        assert decode(data).shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))


def test_scan_results_do_not_depend_on_the_piece_size(monkeypatch):
    files = {f"{number}.png": data for number, data in enumerate(KINDS.values())}
    whole = scan(Memory(files), workers=0)
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)
    again = scan(Memory(files), workers=0)
    assert again.mean == pytest.approx(whole.mean)
    assert again.std == pytest.approx(whole.std)
    assert (again.channels, again.dtypes, again.layouts) == (whole.channels, whole.dtypes, whole.layouts)


def test_missing_rows_are_detected_in_pieces(monkeypatch):
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)
    for data in (png(30, 40, 8, 2, (b"\0" + b"\x80" * 90) * 9), png(15, 40, 16, 2, (b"\0" + b"\x80" * 90) * 9)):
        with pytest.raises(BadImage) as caught:
            list(pieces(data, header(data)))
        assert caught.value.code == "TRUNCATED"


def test_file_that_needs_too_much_memory_is_rejected_by_its_header():
    for data in (
        png(9984, 9984, 16, 2, b""),  # 8 bytes per pixel in Pillow
        png(9984, 9984, 16, 6, b""),
        tiff(np.zeros((4, 4, 3), np.float64), photometric="minisblack", planarconfig="contig"),
    ):
        if data.startswith(b"II"):
            data = bytearray(data)
            page = tiff_pages.read_pages(bytes(data))[0]
            for entry in range(struct.unpack_from("<H", data, page.offset)[0]):
                place = page.offset + 2 + 12 * entry
                if struct.unpack_from("<H", data, place)[0] in (256, 257):
                    struct.pack_into("<HII", data, place + 2, 4, 1, 9000)
        with pytest.raises(BadImage, match="MiB") as caught:
            header(bytes(data))
        assert caught.value.code == "TOO_MANY_PIXELS"


def test_8_bit_photograph_of_100_megapixels_is_accepted():
    assert header(png(10_000, 10_000, 8, 2, b"")).memory == 400_000_000
    jpeg = bytearray(file_of(noisy(64, 64), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 10_000, 10_000)
    assert header(bytes(jpeg)).memory == 300_000_000
    assert header(png(9984, 9984, 16, 0, b"")).memory == 2 * 9984**2


def test_progressive_jpeg_counts_coefficient_memory_and_scans():
    data = file_of(noisy(64, 64), "JPEG", progressive=True, subsampling=0)
    assert header(data).memory == 64 * 64 * (3 + 6)
    assert 5 < header(data).scans < 20
    more = data.replace(b"\xff\xd9", b"\xff\xda\0\x02" * 600_000 + b"\xff\xd9")
    with pytest.raises(BadImage) as caught:
        header(more)
    assert caught.value.code == "TIMEOUT"


def test_costly_files_are_decoded_in_a_separate_process(monkeypatch):
    apart = []
    monkeypatch.setattr(scanning, "call_in_process", lambda function, *args, **_: apart.append(1) or function(*args))
    files = {"a.png": KINDS["png"], "b.jpg": KINDS["jpeg"]}
    assert scan(Memory(files), workers=0).good == 2
    assert not apart
    monkeypatch.setattr(scanning, "GUARDED_MEMORY", 1000)
    assert scan(Memory(files), workers=0).good == 2
    assert len(apart) == 2


@pytest.mark.parametrize(
    ("fault", "code"), [(TooSlow(), "TIMEOUT"), (Crashed(), "CORRUPT"), (MemoryError(), "TOO_MANY_PIXELS")]
)
def test_file_that_exceeds_a_limit_is_reported_and_the_scan_continues(fault, code, monkeypatch):
    true_decoded = scanning._decoded

    def decoded(data, *settings):
        if data == KINDS["gif"]:
            raise fault
        return true_decoded(data, *settings)

    monkeypatch.setattr(scanning, "_decoded", decoded)
    found = scan(Memory({"a.png": KINDS["png"], "b.gif": KINDS["gif"], "c.jpg": KINDS["jpeg"]}), workers=0)
    assert found.good == 2
    assert [(bad.name, bad.code) for bad in found.bad] == [("b.gif", code)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits only apply in forked processes")
def test_memory_limit_applies_if_the_header_predicts_too_little(monkeypatch):
    """Uses a decoder that needs far more memory than the header predicts."""
    monkeypatch.setattr(scanning, "GUARDED_MEMORY", 0)
    monkeypatch.setattr(scanning, "SLACK", 64 << 20)
    monkeypatch.setattr(limits, "MAX_DECODE_BYTES", 64 << 20)

    def greedy(data, found, **_):
        yield np.zeros((1, 1, 3), np.uint8) if len(bytes(1 << 30)) else None

    monkeypatch.setattr(decode_module, "pieces", greedy)
    found = scan(Memory({"a.png": KINDS["png"]}), workers=0)
    assert [bad.code for bad in found.bad] == ["TOO_MANY_PIXELS"]


def test_16_bit_png_uses_the_predicted_memory():
    data = png(3000, 3000, 16, 2, (b"\0" * 18001) * 3000)
    scan(Memory({"a.png": KINDS["png"]}), workers=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert scan(Memory({"a.png": data}), workers=0).good == 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < header(data).memory + (96 << 20)


def test_tiff_with_very_many_entries_is_rejected_quickly():
    entries = b"".join(struct.pack("<HHQQ", 258, 3, 65535, 16) for _ in range(60_000))
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 60_000) + entries + b"\0" * 8
    with pytest.raises(BadImage) as caught:
        header(data)
    assert caught.value.code == "HEADER_BAD"


def test_memory_and_scans_do_not_affect_header_equality():
    assert header(KINDS["png"]) == Header(48, 64, 3, "uint8", "PNG")
    assert header(KINDS["png"]).memory == 4 * 48 * 64
    assert header(KINDS["bands"]).memory == 48 * 64 * 5 * 5 // 4


def test_row_groups_of_gigabytes_are_rejected_before_reading(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": pa.array([b"\0" * 100_000] * 20, pa.binary()), "label": [0] * 20})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 1_000_000)
    with pytest.raises(SourceError, match="row_group_size"):
        open_source(tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", use_dictionary=False, row_group_size=5)
    assert len(open_source(tmp_path / "b.parquet")) == 20


def test_sixteen_bit_alpha_is_composited_in_pieces(monkeypatch):
    values = noisy(channels=4, dtype=np.uint16)
    whole = decode(png16(values))
    monkeypatch.setattr(limits, "FLOAT64_PIXELS", 64 * 5)
    assert (decode(png16(values)) == whole).all()
