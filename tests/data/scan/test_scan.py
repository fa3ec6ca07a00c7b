"""The scan: every bad file is listed with its reason, and the statistics agree with the pixels."""

import io
import os
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from conftest import write_images
from corpus import Memory, bad_files, file_of, noisy, npy, photographs, png16, tiff

from unmask.data.decode.decode import decode
from unmask.data.decode.pixels import conform
from unmask.data.scan import scan as scanning
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source


class Deadly(Memory):
    """A source with a row whose decoding crashes the process."""

    def read(self, i):
        if self.files[i] == b"deadly":
            os._exit(9)
        return self.files[i]


def of(*images):
    return Memory({f"{i}.npy": npy(image) for i, image in enumerate(images)})


def plain(result):
    return {name: str(value) for name, value in vars(result).items() if name != "seconds"}


def test_scan_lists_every_bad_file_with_its_reason(tmp_path):
    bad = bad_files()
    for name, (data, _) in bad.items():
        (tmp_path / name).write_bytes(data)
    for i in range(5):
        (tmp_path / f"good{i}.png").write_bytes(file_of(noisy(seed=i), "PNG"))
    source, start = open_source(tmp_path), time.monotonic()
    found = scan(source)
    assert time.monotonic() - start < 20
    assert found.files == found.checked == len(bad) + 5
    assert {fault.name: fault.code for fault in found.bad} == {name: code for name, (_, code) in bad.items()}
    assert found.good == 5
    assert [source.names[row] for row in found.good_rows] == [f"good{i}.png" for i in range(5)]
    assert [source.names[row] for row in found.bad_rows] == [fault.name for fault in found.bad]
    assert found.bad_fraction == len(bad) / (len(bad) + 5)


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (3, "uint8"), (3, "uint16"), (5, "float32")])
def test_mean_and_standard_deviation_agree_with_the_pixels(channels, dtype):
    images = [noisy(9, 7 + i, channels, np.uint8, i).astype(dtype) * (i + 1) for i in range(6)]
    found = scan(of(*images))
    pixels = np.concatenate([image.reshape(-1, channels) for image in images]).astype(float)
    assert found.mean == pytest.approx(pixels.mean(0), rel=1e-6)
    assert found.std == pytest.approx(pixels.std(0), rel=1e-6)
    assert (found.channels_majority, found.dtype_majority) == (channels, dtype)
    assert (found.min_size, found.max_size, found.median_size) == ((9, 7), (9, 12), (9, 9))
    assert found.decoded_bytes == pytest.approx(pixels.nbytes / 8 * np.dtype(dtype).itemsize / 6)


def test_mixed_channels_follow_the_majority():
    gray, rgb = noisy(8, 8, 1), [noisy(8, 8, 3, seed=i) for i in range(2)]
    found = scan(of(gray, *rgb))
    assert found.channels == {3: 2, 1: 1}
    assert found.good == 3
    pixels = np.concatenate([conform(image, 3, "uint8").reshape(-1, 3) for image in (gray, *rgb)]).astype(float)
    assert found.mean == pytest.approx(pixels.mean(0))
    assert found.std == pytest.approx(pixels.std(0))


def test_files_that_cannot_conform_are_bad():
    found = scan(of(noisy(8, 8), noisy(8, 8), noisy(8, 8, 5), noisy(8, 8).astype(np.float32)))
    assert [fault.code for fault in found.bad] == ["MISMATCHED_CHANNELS", "MISMATCHED_DTYPE"]
    assert found.good_rows.tolist() == [0, 1]


def test_one_16_bit_image_makes_the_data_set_16_bit():
    images = [noisy(8, 8), noisy(8, 8, seed=1), noisy(8, 8, dtype=np.uint16)]
    found = scan(of(*images))
    assert found.dtype_majority == "uint16"
    assert found.good == 3
    pixels = np.concatenate([conform(image, 3, "uint16").reshape(-1, 3) for image in images]).astype(float)
    assert found.mean == pytest.approx(pixels.mean(0))
    assert found.std == pytest.approx(pixels.std(0))


def test_channels_argument_determines_the_statistics():
    images = [noisy(8, 8, seed=i) for i in range(3)]
    for channels in (1, 3):
        found = scan(of(*images), channels=channels)
        pixels = np.concatenate([conform(image, channels, "uint8").reshape(-1, channels) for image in images])
        assert found.mean == pytest.approx(pixels.astype(float).mean(0))
        assert found.std == pytest.approx(pixels.astype(float).std(0))


def test_constant_channel_has_standard_deviation_one():
    found = scan(of(np.full((4, 4, 3), 7, np.uint8)))
    assert found.mean == (7, 7, 7)
    assert found.std == (1, 1, 1)


def test_scan_without_readable_files_reports_them():
    found = scan(Memory({"a.png": b"", "b.png": b"text"}))
    assert (found.good, found.mean, found.bad_fraction, found.channels_majority) == (0, (), 1.0, 0)


def test_sample_is_evenly_spaced_and_reported():
    source = Memory({f"{i:03d}.npy": npy(noisy(4, 4)) for i in range(100)})
    found = scan(source, sample=5)
    assert (found.checked, found.files, found.sampled) == (5, 100, True)
    assert found.good_rows.tolist() == [0, 24, 49, 74, 99]
    assert not scan(source, sample=100).sampled


def test_files_are_decoded_by_content_not_by_extension(tmp_path):
    (tmp_path / "a.jpg").write_bytes(file_of(noisy(), "PNG"))
    (tmp_path / "b.png").write_bytes(file_of(noisy(), "PNG"))
    (tmp_path / "c.jfif").write_bytes(file_of(noisy(), "JPEG"))
    found = scan(open_source(tmp_path))
    assert found.good == 3
    assert found.formats == {"PNG": 2, "JPEG": 1}


def test_scientific_formats_are_scanned(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(noisy(channels=5), photometric="minisblack", planarconfig="contig"))
    (tmp_path / "b.npy").write_bytes(npy(noisy(channels=5)))
    assert scan(open_source(tmp_path)).channels == {5: 2}
    (tmp_path / "a.tif").write_bytes(tiff(noisy(dtype=np.uint16), photometric="rgb"))
    (tmp_path / "b.npy").unlink()
    (tmp_path / "b.png").write_bytes(png16(noisy(dtype=np.uint16)))
    found = scan(open_source(tmp_path))
    assert (found.dtypes, found.mean) == ({"uint16": 2}, pytest.approx(noisy(dtype=np.uint16).mean((0, 1))))


def test_progress_is_reported(monkeypatch):
    told = []
    scan(Memory({f"{i}.npy": npy(noisy(4, 4)) for i in range(130)}), progress=told.append)
    assert told == [64, 128, 130]


@pytest.mark.parametrize("workers", [1, 2])
def test_scan_does_not_depend_on_the_number_of_processes(workers):
    files = {f"{i:03d}.png": file_of(noisy(8, 8 + i % 3, seed=i), "PNG") for i in range(150)}
    files["070.png"] = b"broken"
    assert plain(scan(Memory(files), workers=workers)) == plain(scan(Memory(files), workers=0))


def test_processes_are_started_if_much_work_remains(monkeypatch):
    source = Memory({f"{i:03d}.npy": npy(noisy(4, 4, seed=i)) for i in range(200)})
    alone, used = plain(scan(source)), []
    true_map = ProcessPoolExecutor.map
    monkeypatch.setattr(
        ProcessPoolExecutor, "map", lambda *arguments, **more: used.append(1) or true_map(*arguments, **more)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert plain(scan(source)) == alone
    assert not used
    monkeypatch.setattr(scanning, "PATIENCE", 0.0)
    assert plain(scan(source)) == alone
    assert used


def test_file_that_crashes_its_process_is_found_and_the_rest_is_scanned():
    files = {f"{i:03d}.npy": npy(noisy(4, 4)) for i in range(70)}
    files["066.npy"] = b"deadly"
    found = scan(Deadly(files), workers=1)
    assert found.good == 69
    assert [(fault.name, fault.code) for fault in found.bad] == [("066.npy", "CORRUPT")]


def test_photographs_in_a_tar_are_scanned_and_decoded(tmp_path):
    archive = tmp_path / "photographs.tar"
    with tarfile.open(archive, "w") as tar:
        for number, data in enumerate(photographs()):
            member = tarfile.TarInfo(f"photographs/{number:02d}.JPEG")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(archive)
    found = scan(source)
    assert (found.good, found.bad) == (len(source), [])
    assert len(source) >= 12
    assert found.channels_majority == 3
    assert all(60 < mean < 160 for mean in found.mean)
    assert decode(source.read(0)).shape[2] == 3


def test_usable_images_are_estimated_from_a_sample(tmp_path):
    folder = write_images(tmp_path / "images", 20)
    for number in range(0, 20, 4):
        (folder / f"{number:04d}.png").write_bytes(b"")
    whole = scan(open_source(folder))
    assert (whole.usable, whole.good, whole.sampled) == (15, 15, False)
    part = scan(open_source(folder), sample=10)
    assert part.sampled
    assert part.usable == 2 * part.good > part.good
