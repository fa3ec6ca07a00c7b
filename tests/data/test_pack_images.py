"""Packing: the copy has the same random draws, names and labels as the originals, and is never incomplete."""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import file_of, noisy, npy, png16, smooth
from PIL import Image

from unmask.batch import ImageSpec
from unmask.commands import main
from unmask.console import Console
from unmask.data import pack_images as packing
from unmask.data.augment import CropConfig, cut
from unmask.data.decode.decode import decode, header
from unmask.data.decode.image_header import packed_note
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, training_batches
from unmask.data.order import Order
from unmask.data.pack_images import PackError, pack
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.nn.masks import random_mask
from unmask.rng import Draws

SPEC = ImageSpec(3, (16, 16), "uint8", (0.0,) * 3, (1.0,) * 3)


def turned(pixels: np.ndarray) -> bytes:
    """Return a JPEG that is stored rotated, with the EXIF orientation that displays it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write large and small files of many kinds in two classes; two of the files are bad."""
    files = {
        "cats/0.jpg": file_of(smooth(180, 240), "JPEG", quality=95),
        "cats/1.png": file_of(noisy(120, 90), "PNG"),
        "cats/2.jpg": turned(smooth(200, 150)),
        "cats/3.jpg": file_of(smooth(40, 50), "JPEG"),
        "cats/4.jpg": file_of(smooth(300, 300), "JPEG")[:2000],
        "dogs/0.bmp": file_of(smooth(130, 131), "BMP"),
        "dogs/1.jpg": file_of(smooth(170, 190, 1), "JPEG", quality=95),
        "dogs/2.png": b"",
        "dogs/3.jpg": file_of(smooth(400, 64), "JPEG", quality=95),
    }
    for name, data in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    pack(folder, tmp_path / "copy.tar", short_side=64, workers=0)
    return tmp_path / "copy.tar"


def digests(data: Path, monkeypatch: pytest.MonkeyPatch, *, workers: int = 0, cached: bool = False) -> list[str]:
    """Return a digest for each sample of its row, box in pixels of the original, flip, and patch mask."""
    source = open_source(data)
    images = ImageReader(source, scan(source, workers=0).good_rows, SPEC, CropConfig())
    if cached:
        images.keep_decoded()
    found = []
    true_boxes = ImageReader._boxes
    if workers == 0:  # boxes can only be recorded in this process
        seen: list[np.ndarray] = []

        def boxes(self, sizes, index, epoch):
            drawn, flips = true_boxes(self, sizes, index, epoch)
            seen.extend(np.append(box, flip) for box, flip in zip(drawn, flips, strict=True))
            return drawn, flips

        monkeypatch.setattr(ImageReader, "_boxes", boxes)
    for delivery in training_batches(images, MicroBatches(0, 7, 4), workers=workers):
        batch = delivery.batch
        mask = random_mask(len(batch), (4, 4), 0.75, Draws(0, batch.epoch, batch.index))
        found += [(index, keep) for index, keep in zip(batch.index.tolist(), mask.keep.tolist(), strict=True)]
    monkeypatch.setattr(ImageReader, "_boxes", true_boxes)
    drawn = seen if workers == 0 else [np.zeros(0)] * len(found)
    return [
        hashlib.sha256(str((index, box.tolist(), keep)).encode()).hexdigest()
        for (index, keep), box in zip(found, drawn, strict=True)
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_packed_copy_has_the_same_order_boxes_flips_and_masks(folder, copy, monkeypatch, cached):
    assert digests(copy, monkeypatch, cached=cached) == digests(folder, monkeypatch)


def test_packed_pixels_are_similar_to_the_originals(folder, copy):
    rows = scan(open_source(folder), workers=0).good_rows
    smooth_rows = rows[rows != 1]  # shrinking averages the noise
    one, two = (
        ImageReader(open_source(data), smooth_rows, SPEC, CropConfig())[Order(smooth_rows, 0).take(0, 24)].batch
        for data in (folder, copy)
    )
    assert torch.equal(one.index, two.index)
    assert (one.images.float() - two.images.float()).abs().mean() < 2.0


def test_packed_copy_has_the_same_names_labels_and_bad_files(folder, copy):
    before, after = open_source(folder), open_source(copy)
    assert list(after.names) == list(before.names)
    assert after.classes == before.classes == ["cats", "dogs"]
    assert np.array_equal(after.labels, before.labels)  # type: ignore[arg-type]
    one, two = scan(before, workers=0), scan(after, workers=0)
    assert one.bad == two.bad
    assert len(one.bad) == 2
    assert np.array_equal(one.good_rows, two.good_rows)
    assert np.allclose(one.mean, two.mean, atol=3)


def test_large_images_are_shrunk_and_record_their_original_size(folder, copy):
    source = open_source(copy)
    heads = {name: header(source.read(i)) for i, name in enumerate(source.names) if i not in (4, 7)}
    shown = {name: ((head.height, head.width), head.packed_from, head.format, head.channels)
             for name, head in heads.items()}  # fmt: skip
    assert shown == {
        "cats/0.jpg": ((64, 85), (180, 240), "JPEG", 3),
        "cats/1.png": ((85, 64), (120, 90), "PNG", 3),
        "cats/2.jpg": ((85, 64), (200, 150), "JPEG", 3),
        "cats/3.jpg": ((40, 50), None, "JPEG", 3),
        "dogs/0.bmp": ((64, 64), (130, 131), "PNG", 3),
        "dogs/1.jpg": ((64, 72), (170, 190), "JPEG", 1),
        "dogs/3.jpg": ((400, 64), None, "JPEG", 3),
    }
    for i in (3, 4, 7, 8):
        assert source.read(i) == (folder / source.names[i]).read_bytes()
    for i, name in enumerate(source.names):
        if name in heads:
            with Image.open(io.BytesIO(source.read(i))) as other:  # other programs can read the image
                assert other.size == (heads[name].width, heads[name].height)
                other.load()


def test_packing_twice_records_the_size_of_the_first_original(copy, tmp_path):
    pack(copy, tmp_path / "again.tar", short_side=32, workers=0)
    assert header(open_source(tmp_path / "again.tar").read(0)).full_size == (180, 240)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jpg", file_of(smooth(200, 150), "JPEG", quality=1)),  # The shrunk image would be a larger file.
        ("a.npy", npy(smooth(208, 160, 128))),  # 166 x 128 x 128 would be read as 166 channels.
    ],
)
def test_images_that_would_not_shrink_are_copied_byte_for_byte(tmp_path, name, data):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(data)
    found = pack(tmp_path / "images", tmp_path / "copy.tar", short_side=128, workers=0)
    assert (found.shrunk, found.copied_because, found.bad) == (0, {"cannot be made smaller": 1}, ())
    assert open_source(tmp_path / "copy.tar").read(0) == data


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rgb.png", png16(smooth(200, 150, 3, top=65535))),
        ("gray.png", png16(smooth(200, 151, 1, top=65535))),
        ("float.npy", npy(smooth(200, 150).astype(np.float32) / 7 - 3)),
        ("bands.npy", npy(smooth(200, 150, 5))),
        ("bands16.npy", npy(smooth(151, 200, 7, top=65535))),
        ("first.npy", npy(smooth(200, 150, 5).transpose(2, 0, 1))),
    ],
)
def test_shrunk_images_have_the_same_channels_and_dtype(tmp_path, name, data):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(data)
    found = pack(tmp_path / "images", tmp_path / "copy.tar", short_side=128, workers=0)
    assert (found.shrunk, found.copied, found.bad) == (1, 0, ())
    copied = open_source(tmp_path / "copy.tar").read(0)
    before, after = header(data), header(copied)
    assert after.packed_from == (before.height, before.width)
    assert min(after.height, after.width) == 128
    assert (after.channels, after.dtype) == (before.channels, before.dtype)
    large, small = decode(data), decode(copied)
    wanted = cut(large, np.array([0.0, 0.0, *large.shape[:2]]), small.shape[:2], False)
    assert np.array_equal(small, wanted)


@pytest.mark.parametrize("workers", [1, 2])
def test_packed_file_does_not_depend_on_the_number_of_processes(folder, copy, tmp_path, workers):
    pack(folder, tmp_path / "other.tar", short_side=64, workers=workers)
    assert (tmp_path / "other.tar").read_bytes() == copy.read_bytes()


def test_size_note_that_does_not_match_is_ignored():
    plain = file_of(smooth(30, 40), "JPEG")
    for note, heeded in (
        (packed_note((30, 40), (300, 400)), (300, 400)),
        (packed_note((60, 80), (300, 400)), None),  # the note of a larger image, of which this one is a crop
        (packed_note((30, 40), (20, 30)), None),
        (packed_note((30, 40), (30_000, 40_000)), None),
        (b"unmask\0packed by hand", None),
        (b"a holiday", None),
    ):
        comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
        head = header(plain[:2] + comment + plain[2:])
        assert head.packed_from == heeded
        assert head.full_size == (heeded or (30, 40))


def test_masks_of_packed_images_are_checked_against_the_original_size(tmp_path):
    from unmask.data.annotations.open_masks import open_masks

    for kind, pixels in (("images", smooth(100, 120)), ("masks", np.tile(np.arange(2, dtype=np.uint8), (100, 60)))):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    pack(tmp_path / "images", tmp_path / "copy.tar", short_side=32, workers=0)
    maps = open_masks(tmp_path / "copy.tar", masks=tmp_path / "masks")
    got = ImageReader(maps.source, np.arange(1), SPEC, CropConfig(), annotations=maps)[
        Order(np.arange(1), 0).take(0, 1)
    ]
    assert got.batch.maps is not None
    assert set(got.batch.maps.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_packing_leaves_no_file(folder, tmp_path, monkeypatch, fault):
    true_image = packing.pack_image

    def image(source, row, *more):
        if row == 5:
            raise fault
        return true_image(source, row, *more)

    monkeypatch.setattr(packing, "pack_image", image)
    with pytest.raises((KeyboardInterrupt, PackError)):
        pack(folder, tmp_path / "copy.tar", short_side=64, workers=0)
    assert not list(tmp_path.glob("copy.tar*"))


def test_leftover_of_a_killed_packing_is_reported(folder, tmp_path, capsys):
    (tmp_path / ".copy.tar.77.part").write_bytes(b"half")
    pack(folder, tmp_path / "copy.tar", short_side=64, workers=0, console=Console())
    said = capsys.readouterr().err
    assert "another pack is running, or one was killed; in that case delete it" in said
    assert ".copy.tar.77.part" in said


def test_existing_file_is_not_overwritten(folder, copy):
    before = copy.read_bytes()
    with pytest.raises(PackError, match="already exists"):
        pack(folder, copy)
    assert copy.read_bytes() == before


def test_data_that_a_tar_cannot_store_are_rejected(folder, tmp_path):
    (tmp_path / "order.txt").write_text("images/dogs/0.bmp\nimages/cats/0.jpg\n")
    (tmp_path / "labels.csv").write_text("images/cats/0.jpg,zebra\nimages/dogs/0.bmp,ant\n")
    for data, message in (
        (tmp_path / "order.txt", "not sorted by name"),
        (tmp_path / "labels.csv", "not its folder names"),
        ("shapes:10", "have no file names"),
    ):
        with pytest.raises(PackError, match=message):
            pack(data, tmp_path / "copy.tar", workers=0)
    with pytest.raises(PackError, match=r"ends in \.tar"):
        pack(folder, tmp_path / "copy.zip")
    with pytest.raises(PackError, match="got -1 workers"):
        pack(folder, tmp_path / "copy.tar", workers=-1)
    with pytest.raises(PackError, match="quality 0"):
        pack(folder, tmp_path / "copy.tar", quality=0)
    assert not list(tmp_path.glob("copy*"))


def test_pack_command_writes_the_file_and_reports_counts(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "copy.tar"
    monkeypatch.setattr(sys, "argv", ["unmask", "pack", str(folder), str(out), "--short-side", "64", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["images"], found["shrunk"], found["copied"]) == (9, 5, 4)
    assert found["copied_because"] == {"bad": 2, "small enough": 2}
    assert "4 copied unchanged (2 bad; 2 small enough)" in said.err
    assert [bad["name"] for bad in found["bad"]] == ["cats/4.jpg", "dogs/2.png"]
    assert "2 images cannot be read and were copied unchanged" in said.err
    assert found["bytes_after"] < found["bytes_before"]
    assert len(open_source(out)) == 9


def test_packing_uses_the_reading_of_the_data_set(tmp_path):
    from corpus import tiff

    (tmp_path / "bands").mkdir()
    for number in range(4):
        values = smooth(160, 200, 4) // 2 + 60
        if number == 3:  # this file alone would be read as having alpha
            values[..., 3] = 255
        (tmp_path / "bands" / f"{number}.tif").write_bytes(tiff(values, photometric="rgb", extrasamples=["unassalpha"]))
    (tmp_path / "cubes").mkdir()
    for number in range(4):
        values = smooth(20, 160 + 10 * number, 200 + 10 * number).astype(
            np.float32
        )  # each file alone would be read as (H, W, C)
        np.save(tmp_path / "cubes" / f"{number}.npy", values)
    for name, kind, shrunk in (("bands", {4: 4}, 4), ("cubes", {20: 4}, 0)):
        before = scan(open_source(tmp_path / name))
        done = pack(tmp_path / name, tmp_path / f"{name}.tar", short_side=80, workers=0, console=Console(quiet=True))
        after = scan(open_source(tmp_path / f"{name}.tar"))
        assert done.shrunk == shrunk
        assert before.channels == after.channels == kind
