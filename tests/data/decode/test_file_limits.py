"""What one file may cost: bytes and seconds, as its header predicts them, and enforced where it lies."""

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
def test_pieces_are_the_image(kind, monkeypatch):
    data = KINDS[kind]
    whole = decode(data)
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)  # of seven rows
    parts = list(pieces(data, header(data)))
    assert len(parts) == 7
    assert (np.concatenate(parts) == whole).all()
    assert (decode(data) == whole).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pieces_are_as_stored(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = file_of(smooth(), kind, exif=exif)
        assert np.concatenate(list(pieces(data, header(data)))).shape == (48, 64, 3)
        assert decode(data).shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))


def test_statistics_and_the_rest_of_a_look_do_not_depend_on_pieces(monkeypatch):
    files = {f"{number}.png": data for number, data in enumerate(KINDS.values())}
    whole = scan(Memory(files), workers=0)
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)
    again = scan(Memory(files), workers=0)
    assert again.mean == pytest.approx(whole.mean)
    assert again.std == pytest.approx(whole.std)
    assert (again.channels, again.dtypes, again.layouts) == (whole.channels, whole.dtypes, whole.layouts)


def test_missing_rows_are_noticed_in_pieces_too(monkeypatch):
    monkeypatch.setattr(limits, "PIECE_PIXELS", 64 * 7)
    for data in (png(30, 40, 8, 2, (b"\0" + b"\x80" * 90) * 9), png(15, 40, 16, 2, (b"\0" + b"\x80" * 90) * 9)):
        with pytest.raises(BadImage) as caught:
            list(pieces(data, header(data)))
        assert caught.value.code == "TRUNCATED"


def test_what_takes_too_much_memory_is_refused_by_its_header():
    for data in (
        png(9984, 9984, 16, 2, b""),  # 8 bytes of a pixel in Pillow
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


def test_a_photograph_of_100_megapixels_of_8_bits_may_be_read():
    assert header(png(10_000, 10_000, 8, 2, b"")).memory == 400_000_000
    jpeg = bytearray(file_of(noisy(64, 64), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 10_000, 10_000)
    assert header(bytes(jpeg)).memory == 300_000_000
    assert header(png(9984, 9984, 16, 0, b"")).memory == 2 * 9984**2


def test_a_progressive_jpeg_keeps_all_coefficients_and_its_scans_take_time():
    data = file_of(noisy(64, 64), "JPEG", progressive=True, subsampling=0)
    assert header(data).memory == 64 * 64 * (3 + 6)
    assert 5 < header(data).scans < 20
    more = data.replace(b"\xff\xd9", b"\xff\xda\0\x02" * 600_000 + b"\xff\xd9")
    with pytest.raises(BadImage) as caught:
        header(more)
    assert caught.value.code == "TIMEOUT"


def test_costly_files_are_decoded_apart_and_ordinary_ones_here(monkeypatch):
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
def test_a_file_beyond_its_limits_is_named_and_the_scan_goes_on(fault, code, monkeypatch):
    true_decoded = scanning._decoded

    def decoded(data, *settings):
        if data == KINDS["gif"]:
            raise fault
        return true_decoded(data, *settings)

    monkeypatch.setattr(scanning, "_decoded", decoded)
    found = scan(Memory({"a.png": KINDS["png"], "b.gif": KINDS["gif"], "c.jpg": KINDS["jpeg"]}), workers=0)
    assert found.good == 2
    assert [(bad.name, bad.code) for bad in found.bad] == [("b.gif", code)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits hold in forked processes")
def test_limits_hold_where_a_header_lies(monkeypatch):
    """A decoder that takes far more than its header predicts."""
    monkeypatch.setattr(scanning, "GUARDED_MEMORY", 0)
    monkeypatch.setattr(scanning, "SLACK", 64 << 20)
    monkeypatch.setattr(limits, "MAX_DECODE_BYTES", 64 << 20)

    def greedy(data, found, **_):
        yield np.zeros((1, 1, 3), np.uint8) if len(bytes(1 << 30)) else None

    monkeypatch.setattr(decode_module, "pieces", greedy)
    found = scan(Memory({"a.png": KINDS["png"]}), workers=0)
    assert [bad.code for bad in found.bad] == ["TOO_MANY_PIXELS"]


def test_a_16_bit_png_takes_what_it_is_said_to_take():
    data = png(3000, 3000, 16, 2, (b"\0" * 18001) * 3000)
    scan(Memory({"a.png": KINDS["png"]}), workers=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert scan(Memory({"a.png": data}), workers=0).good == 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < header(data).memory + (96 << 20)


def test_a_tiff_of_very_many_entries_is_refused_at_once():
    entries = b"".join(struct.pack("<HHQQ", 258, 3, 65535, 16) for _ in range(60_000))
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 60_000) + entries + b"\0" * 8
    with pytest.raises(BadImage) as caught:
        header(data)
    assert caught.value.code == "HEADER_BAD"


def test_limits_are_part_of_the_header_and_not_of_its_meaning():
    assert header(KINDS["png"]) == Header(48, 64, 3, "uint8", "PNG")
    assert header(KINDS["png"]).memory == 4 * 48 * 64
    assert header(KINDS["bands"]).memory == 48 * 64 * 5 * 5 // 4


def test_row_groups_of_gigabytes_are_refused_before_they_are_read(tmp_path, monkeypatch):
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


def test_sixteen_bit_alpha_is_composited_in_parts(monkeypatch):
    values = noisy(channels=4, dtype=np.uint16)
    whole = decode(png16(values))
    monkeypatch.setattr(limits, "FLOAT64_PIXELS", 64 * 5)
    assert (decode(png16(values)) == whole).all()
