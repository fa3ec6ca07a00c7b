"""The scan cache: later scans decode only files that changed, and a damaged cache changes no result."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from unmask.data.decode.bad_image import BadImage
from unmask.data.scan import scan as scanning
from unmask.data.scan import scan_cache as module
from unmask.data.scan.scan import scan
from unmask.data.scan.scan_cache import FileRecordsBuilder, cache_file, joined, load_records
from unmask.data.sources.open_source import open_source


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    """Cache the results of every scan, however short, including those of recently changed files."""
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "memory"))
    monkeypatch.setattr(module, "WORTH_KEEPING", -1.0)
    monkeypatch.setattr(module, "COARSEST_CLOCK", -3600 * 10**9)
    return tmp_path / "memory"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "images", 12, classes=3)


def plain(result):
    return {name: str(value) for name, value in vars(result).items() if name not in ("seconds", "known")}


def looked_at(monkeypatch) -> list[int]:
    """Return a list to which every decoded row is appended from now on."""
    rows: list[int] = []
    scan_file = scanning._scan_file

    def noting(source, row, like=None):
        rows.append(row)
        return scan_file(source, row, like)

    monkeypatch.setattr(scanning, "_scan_file", noting)
    return rows


def test_unchanged_files_are_not_decoded_again(folder, monkeypatch):
    first = scan(open_source(folder))
    rows = looked_at(monkeypatch)
    again = scan(open_source(folder))
    assert rows == []
    assert (first.known, again.known) == (0, 12)
    assert plain(first) == plain(again)
    assert scan(open_source(folder), ignore_cache=True).known == 0
    assert len(rows) == 12


@pytest.mark.parametrize("worth", [-1.0, 1e9])
def test_file_that_becomes_unreadable_is_removed_from_the_cache(folder, monkeypatch, worth):
    scan(open_source(folder))
    monkeypatch.setattr(module, "WORTH_KEEPING", worth)
    scan_file = scanning._scan_file
    broken = BadImage("TRUNCATED", "a bit has rotted")
    monkeypatch.setattr(
        scanning, "_scan_file", lambda source, row, like=None: broken if row == 3 else scan_file(source, row, like)
    )
    assert len(scan(open_source(folder), ignore_cache=True).bad) == 1
    assert len(scan(open_source(folder)).bad) == 1, "the cached record of the readable file was removed"
    monkeypatch.setattr(scanning, "_scan_file", lambda source, row, like=None: broken)
    assert len(scan(open_source(folder), ignore_cache=True).bad) == 12
    assert len(scan(open_source(folder)).bad) == 12


def test_only_new_changed_and_renamed_files_are_decoded(folder, monkeypatch):
    scan(open_source(folder))
    names = open_source(folder).names
    shutil.copy(folder / names[3], folder / "class0" / "0000a.png")
    (folder / names[5]).write_bytes((folder / names[6]).read_bytes() + b"\0")
    (folder / names[8]).rename(folder / "class2" / "9999.png")
    (folder / names[0]).unlink()
    source, rows = open_source(folder), looked_at(monkeypatch)
    found = scan(source)
    assert sorted(source.names[row] for row in rows) == sorted(["class0/0000a.png", names[5], "class2/9999.png"])
    assert plain(found) == plain(scan(source, ignore_cache=True))


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell when a file was last changed in any way")
def test_changed_content_with_the_old_size_and_time_is_detected(folder, monkeypatch):
    scan(open_source(folder))
    path = folder / open_source(folder).names[4]
    before, size = path.stat(), path.stat().st_size
    path.write_bytes(b"x" * size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    rows = looked_at(monkeypatch)
    found = scan(open_source(folder))
    assert rows == [4]
    assert [bad.code for bad in found.bad] == ["NOT_IMAGE"]


def test_bad_files_are_decoded_in_every_scan(folder, monkeypatch):
    (folder / "class1" / "bad.png").write_bytes(b"no image")
    first, rows = scan(open_source(folder)), looked_at(monkeypatch)
    again = scan(open_source(folder))
    assert [open_source(folder).names[row] for row in rows] == ["class1/bad.png"]
    assert plain(first) == plain(again)


def test_recently_changed_file_is_not_cached(folder, monkeypatch):
    monkeypatch.setattr(module, "COARSEST_CLOCK", 2 * 10**9)
    scan(open_source(folder))
    assert scan(open_source(folder)).known == 0


def test_scan_of_a_sample_adds_to_the_cache(folder):
    scan(open_source(folder), sample=5)
    assert scan(open_source(folder), sample=2).known == 2
    found = scan(open_source(folder))
    assert found.known == 5
    assert plain(found) == plain(scan(open_source(folder), ignore_cache=True))
    (folder / open_source(folder).names[0]).write_bytes(b"damaged")
    scan(open_source(folder), sample=2, ignore_cache=True)
    assert scan(open_source(folder)).known == 11


def test_interrupted_scan_continues_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK", 4)
    folder = write_images(tmp_path / "images", 10)

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(open_source(folder), workers=0, progress=stop)
    found = scan(open_source(folder), workers=0)
    assert found.known == 4
    assert plain(found) == plain(scan(open_source(folder), ignore_cache=True))


def test_members_of_an_archive_are_cached_until_it_changes(folder, tmp_path):
    def pack(level):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(folder / level, level)

    pack("class0")
    first = scan(open_source(tmp_path / "a.tar"))
    again = scan(open_source(tmp_path / "a.tar"))
    assert (again.known, plain(again)) == (4, plain(first))
    pack("class1")
    assert scan(open_source(tmp_path / "a.tar")).known == 0


def test_unwritable_cache_is_reported(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "file"))
    assert "cannot write to" in scan(open_source(folder)).forgotten
    monkeypatch.setenv("UNMASK_CACHE", "OFF")
    assert scan(open_source(folder)).forgotten == ""


def test_embedded_images_are_not_cached(memory):
    scan(open_source("shapes:5"))
    assert not memory.exists()
    assert cache_file(open_source("shapes:5")) is None


def test_cache_can_be_disabled_and_depends_on_the_decoders(folder, memory, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", "off")
    scan(open_source(folder))
    assert not memory.exists()
    monkeypatch.setenv("UNMASK_CACHE", str(memory))
    scan(open_source(folder))
    monkeypatch.setattr(module, "_about", lambda: "another Pillow")
    assert scan(open_source(folder)).known == 0


def test_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("UNMASK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / "unmask"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert module.cache_folder() == tmp_path / "home" / ".cache" / "unmask"

    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert module.cache_folder() is None


def test_scan_works_without_a_writable_cache(folder, memory):
    memory.write_bytes(b"a file where the folder should be")
    found = scan(open_source(folder))
    assert plain(found) == plain(scan(open_source(folder)))
    assert memory.read_bytes() == b"a file where the folder should be"


def test_damaged_cache_is_ignored(folder):
    source = open_source(folder)
    whole = plain(scan(source))
    file = cache_file(source)
    assert file is not None
    content, rng = file.read_bytes(), np.random.default_rng(0)
    damaged = [content[: int(cut)] for cut in rng.integers(0, len(content), 60)]
    for place in rng.integers(0, len(content), 240):
        one = bytearray(content)
        one[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(one))
    useless = 0
    for one in damaged:
        file.write_bytes(one)
        useless += load_records(source) is None
        assert plain(scan(source, workers=0)) == whole
    assert useless == 300
    file.write_bytes(content)
    assert scan(source).known == 12


def test_records_are_split_and_joined(folder):
    source = open_source(folder)
    so_far = [FileRecordsBuilder(), FileRecordsBuilder()]
    for row in range(len(source)):
        record = scanning._scan_file(source, row)
        assert isinstance(record, module.FileRecord)
        so_far[row % 2].add(row, record)
    both = joined(part.build() for part in so_far)
    assert both.rows.tolist() == list(range(12))
    for row in (0, 7, 11):
        record = scanning._scan_file(source, row)
        one = both.at(np.array([row]))
        assert isinstance(record, module.FileRecord)
        assert np.array_equal(one.sums, record.sums)
        assert np.array_equal(one.squares, record.squares)
        assert tuple(one.sizes[0]) == record.size
