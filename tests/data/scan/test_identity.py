"""A data set is compared with its record: unchanged content passes with any times, changed content never passes."""

import io
import os
import shutil
import tarfile
import time

import numpy as np
import pytest

from unmask.data.decode.bad_image import BadImage
from unmask.data.files.string_table import StringTable
from unmask.data.scan.identity import compare, digest_all, read_record, record_of
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import content_digest

OLD = time.time() - 1000


def npy(seed):
    file = io.BytesIO()
    np.save(file, np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8))
    return file.getvalue()


def folder(root, count=6, seed=0):
    root.mkdir(exist_ok=True)
    for number in range(count):
        (root / f"{number}.npy").write_bytes(npy(seed + number))
        os.utime(root / f"{number}.npy", (OLD, OLD))
    return root


def recorded(data, path):
    source = open_source(data)
    source.opened += 100  # as if the files had been written long ago
    source.digests = scan(source, workers=0).digests
    record_of(source).write(path)
    record = read_record(path)
    assert record is not None
    return record


def differs(record, data):
    source = open_source(data)
    return compare(record, source, np.arange(len(source)))


def test_record_is_restored_and_files_with_the_same_times_are_not_read(tmp_path, monkeypatch):
    record = recorded(folder(tmp_path / "a"), tmp_path / "record")
    assert list(record.names) == [f"{number}.npy" for number in range(6)]
    assert (record.digests == [content_digest(npy(number)) for number in range(6)]).all()
    source = open_source(tmp_path / "a")
    monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("no file should be read"))
    found = compare(record, source, np.arange(6))
    assert not found
    assert found.reread == 0
    assert (source.digests == record.digests).all()


@pytest.mark.parametrize("way", ["in place", "renamed over, old time set"])
def test_changed_content_of_the_same_size_is_detected(tmp_path, way):
    record = recorded(folder(tmp_path / "a"), tmp_path / "record")
    if way == "in place":
        (tmp_path / "a" / "3.npy").write_bytes(npy(99))
    else:
        (tmp_path / "new").write_bytes(npy(99))
        os.utime(tmp_path / "new", (OLD, OLD))
        os.replace(tmp_path / "new", tmp_path / "a" / "3.npy")
    found = differs(record, tmp_path / "a")
    assert found.changed == [("3.npy", "content")]
    assert found.lines() == "1 changed: 3.npy (content)"


def test_copied_and_touched_files_count_as_unchanged(tmp_path):
    record = recorded(folder(tmp_path / "a"), tmp_path / "record")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # all copies have different times
    found = differs(record, tmp_path / "b")
    assert not found
    assert found.reread == 6


def test_added_removed_and_resized_files_are_reported(tmp_path):
    record = recorded(folder(tmp_path / "a"), tmp_path / "record")
    (tmp_path / "a" / "0.npy").unlink()
    (tmp_path / "a" / "9.npy").write_bytes(npy(9))
    (tmp_path / "a" / "2.npy").write_bytes(b"short")
    found = differs(record, tmp_path / "a")
    assert (found.added, found.removed) == (["9.npy"], ["0.npy"])
    assert [name for name, _ in found.changed] == ["2.npy"]
    assert "1 removed: 0.npy; 1 added: 9.npy" in found.lines()
    assert found.as_json()["num_changed"] == 1


def test_list_in_another_order_is_a_difference(tmp_path):
    folder(tmp_path / "a")
    (tmp_path / "list.txt").write_text("a/0.npy\na/1.npy\n")
    record = recorded(tmp_path / "list.txt", tmp_path / "record")
    (tmp_path / "list.txt").write_text("a/1.npy\na/0.npy\n")
    found = differs(record, tmp_path / "list.txt")
    assert found
    assert found.lines() == "the same files in another order"


def test_changes_in_unused_rows_are_ignored(tmp_path):
    record = recorded(folder(tmp_path / "a"), tmp_path / "record")
    (tmp_path / "a" / "3.npy").write_bytes(npy(99))
    assert not compare(record, open_source(tmp_path / "a"), np.array([0, 1, 2, 4, 5]))


def test_without_a_digest_a_file_is_changed_if_its_size_or_modification_time_is(tmp_path):
    source = open_source(folder(tmp_path / "a"))
    record_of(source).write(tmp_path / "record")
    record = read_record(tmp_path / "record")
    assert record is not None
    os.chmod(tmp_path / "a" / "1.npy", 0o600)  # not the content
    assert not differs(record, tmp_path / "a")
    os.utime(tmp_path / "a" / "1.npy")
    assert [name for name, _ in differs(record, tmp_path / "a").changed] == ["1.npy"]


def test_members_of_an_archive_are_compared_by_content(tmp_path):
    def pack(seed):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(folder(tmp_path / "a", seed=seed), "a")

    pack(0)
    record = recorded(tmp_path / "a.tar", tmp_path / "record")
    os.utime(tmp_path / "a.tar")
    assert differs(record, tmp_path / "a.tar").reread == 6
    pack(1)
    assert len(differs(record, tmp_path / "a.tar").changed) == 6


def test_damaged_record_reads_as_none(tmp_path):
    recorded(folder(tmp_path / "a"), tmp_path / "record")
    content = bytearray((tmp_path / "record").read_bytes())
    content[200] ^= 1
    (tmp_path / "record").write_bytes(content)
    assert read_record(tmp_path / "record") is None


def test_a_record_of_many_files_is_small(tmp_path):
    source = open_source(folder(tmp_path / "a", 2))
    count = 20_000
    source.names = StringTable(f"n{number % 100:03d}/{number:08d}.JPEG" for number in range(count))
    source.sizes = source.changed = source.modified = np.arange(count)
    source.digests = np.arange(count, dtype=np.uint64)
    record_of(source).write(tmp_path / "record")
    assert (tmp_path / "record").stat().st_size < 70 * count


@pytest.mark.parametrize("known", [True, False])
def test_file_changed_after_listing_raises_bad_image(tmp_path, known):
    source = open_source(folder(tmp_path / "a"))
    if known:
        digest_all(source)
    assert source.read_unchanged(2) == npy(2)
    os.chmod(tmp_path / "a" / "2.npy", 0o600)
    assert source.read_unchanged(2) == npy(2)
    (tmp_path / "a" / "2.npy").write_bytes(npy(77))
    with pytest.raises(BadImage, match="has changed since the data were opened") as fault:
        source.read_unchanged(2)
    assert fault.value.code == "CHANGED"
    if known:  # the file gets its original content back
        (tmp_path / "a" / "2.npy").write_bytes(npy(2))
        assert source.read_unchanged(2) == npy(2)


def test_archive_replaced_after_listing_is_detected(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder(tmp_path / "a"), "a")
    source = open_source(tmp_path / "a.tar")
    digest_all(source)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder(tmp_path / "b", seed=50), "a")
    with pytest.raises(BadImage, match="CHANGED"):
        source.read_unchanged(0)
