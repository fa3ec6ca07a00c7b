"""Real-world archives: links, updated members, Windows names, and data sets in many shards."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import file_of, noisy

from unmask.data.annotations.labels import require_labels
from unmask.data.sources.exclude import matcher
from unmask.data.sources.open_source import open_source
from unmask.errors import SourceError


def png(seed):
    return file_of(noisy(8, 8, seed=seed), "PNG")


def tar_of(path: Path, members, mode="w"):
    """members: (name, content), or (name, kind, target) for links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def read_all(source):
    """Return the content by name, after checking that a pickled copy reads the same."""
    again = pickle.loads(pickle.dumps(source))
    found = {name: source.read(row) for row, name in enumerate(source.names)}
    assert found == {name: again.read(row) for row, name in enumerate(again.names)}
    return found


@pytest.mark.parametrize(("name", "mode"), [("d.tar", "w"), ("d.tar.gz", "w:gz")])
def test_class_of_hard_and_symbolic_links_is_read(tmp_path, name, mode):
    members = [
        ("./blobs/one", png(1)),
        ("./a/0.png", png(0)),
        ("./b/0.png", tarfile.LNKTYPE, "./a/0.png"),
        ("b/1.png", tarfile.LNKTYPE, "blobs/one"),  # the target does not have the name of an image
        ("b/2.png", tarfile.SYMTYPE, "../a/0.png"),
        ("b/3.png", tarfile.SYMTYPE, "2.png"),
        ("b/4.png", tarfile.SYMTYPE, "../../../etc/passwd"),
        ("b/5.png", tarfile.SYMTYPE, "6.png"),
        ("b/6.png", tarfile.SYMTYPE, "5.png"),
        ("b/7.png", tarfile.LNKTYPE, "nowhere.png"),
    ]
    source = open_source(tar_of(tmp_path / name, members, mode))
    assert source.classes == ["a", "b"]
    assert read_all(source) == {
        "a/0.png": png(0), "b/0.png": png(0), "b/1.png": png(1), "b/2.png": png(0), "b/3.png": png(0),
    }  # fmt: skip
    assert source.skipped["link to nothing in the archive"] == 4


@pytest.mark.parametrize(("name", "mode"), [("d.tar", "w"), ("d.tar.gz", "w:gz")])
def test_last_of_two_members_with_the_same_name_is_read(tmp_path, name, mode):
    members = [
        ("a.png", png(0)), ("b.png", png(1)), ("c.png", tarfile.LNKTYPE, "a.png"), ("./a.png", png(2)),
        ("b.png", tarfile.SYMTYPE, "c.png"),
    ]  # fmt: skip
    source = open_source(tar_of(tmp_path / name, members, mode))
    assert read_all(source) == {"a.png": png(2), "b.png": png(0), "c.png": png(0)}
    assert source.skipped == {"replaced by a later member of the same name": 2}


@pytest.mark.parametrize(("system", "names"), [(0, ["x/a/0.png", "x/b/1.png"]), (3, ["x\\a\\0.png", "x\\b\\1.png"])])
def test_backslashes_from_windows_separate_folders(tmp_path, system, names):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name in ("x\\a\\0.png", "x\\b\\1.png", "x\\..\\..\\2.png", "x\\b\\"):
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, png(len(name)))
    source = open_source(tmp_path / "d.zip")
    assert [name for name in source.names if ".." not in name] == names
    assert source.classes == (["a", "b"] if system == 0 else [])
    assert (source.skipped["path that leaves the archive"], len(source)) == ((1, 2) if system == 0 else (0, 3))
    assert source.read(source.names.index(names[0])) == png(len("x\\a\\0.png"))


def webdataset(folder, shards=3, each=4, extra=".cls"):
    for shard in range(shards):
        members = []
        for i in range(each):
            label = {".cls": str((shard + i) % 12).encode(), ".json": b'{"label": "L%d", "w": 8}' % (i % 2)}.get(extra)
            members += [(f"{i:06d}.png", png(10 * shard + i))] + ([(f"{i:06d}{extra}", label)] if label else [])
        tar_of(folder / f"shard-{shard:05d}.tar", members)
    return folder


def test_a_folder_of_webdataset_shards_is_one_source(tmp_path):
    source = open_source(webdataset(tmp_path / "wds"))
    assert source.names[:2] == ["shard-00000/000000.png", "shard-00000/000001.png"]
    assert len(set(source.names)) == 12
    assert source.read(5) == png(11)
    assert [source.classes[label] for label in source.labels] == [str(s + i) for s in range(3) for i in range(4)]
    assert not source.skipped
    read_all(source)
    other = open_source(str(tmp_path / "wds" / "shard-*.tar"))
    assert (other.names, other.fingerprint()) == (source.names, source.fingerprint())
    assert open_source(other.location).fingerprint() == other.fingerprint()
    json = open_source(webdataset(tmp_path / "json", extra=".json"))
    assert json.classes == ["L0", "L1"]
    assert open_source(webdataset(tmp_path / "none", extra="")).labels is None


def test_tar_names_are_classes_unless_they_are_numbered_shards(tmp_path):
    with pytest.raises(SourceError, match="no class labels"):
        require_labels(open_source(webdataset(tmp_path / "none", extra="")))
    for name in ("cats", "dogs"):
        tar_of(tmp_path / "pets" / f"{name}.tar", [("0.png", png(1)), ("1.png", png(2))])
    assert open_source(tmp_path / "pets").classes == ["cats", "dogs"]
    for name in ("n01440764", "n01443537"):
        tar_of(tmp_path / "imagenet" / f"{name}.tar", [(f"{name}_1.png", png(1)), (f"{name}_2.png", png(2))])
    assert open_source(tmp_path / "imagenet").classes == ["n01440764", "n01443537"]


def test_missing_labels_in_a_webdataset_are_reported(tmp_path):
    tar_of(tmp_path / "d.tar", [("0.png", png(0)), ("0.cls", b"3"), ("1.png", png(1))])
    with pytest.raises(SourceError, match=r"1 of 2 images have no .cls file .* 1.png"):
        require_labels(open_source(tmp_path / "d.tar"))


def table(path: Path, seeds, column="image", label="label", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]
    pq.write_table(pa.table({column: rows, **({label: [f"c{seed % 3}" for seed in seeds]} if label else {})}), path)


def test_a_folder_or_glob_of_parquet_files_is_one_source(tmp_path, monkeypatch):
    for shard in range(3):
        table(tmp_path / "set" / "data" / f"train-{shard:05d}-of-00003.parquet", [shard, shard + 5])
    for data in (tmp_path / "set", str(tmp_path / "set" / "data" / "*.parquet"), str(tmp_path / "set/**/*.parquet")):
        source = open_source(data)
        assert [source.read(i) for i in range(6)] == [png(seed) for seed in (0, 5, 1, 6, 2, 7)]
        assert [source.classes[label] for label in source.labels] == ["c0", "c2", "c1", "c0", "c2", "c1"]
        assert source.names[0].endswith("train-00000-of-00003/0.png")
        read_all(source)
    monkeypatch.setattr("unmask.data.limits.MAX_UNPACKED_BYTES", 1)
    source = pickle.loads(pickle.dumps(source))
    for row in range(6):
        source.read(row)
    assert sum(len(part.groups) for part in source.parts) == len(source.parts), (
        "one group in total, shared by all parts"
    )


def test_split_names_of_shards_are_not_classes(tmp_path):
    for split in ("train", "test"):
        table(tmp_path / "set" / f"{split}-00000-of-00001.parquet", [0, 1])
    with pytest.raises(SourceError, match=r"several splits \(test, train\).*as a glob"):
        require_labels(open_source(tmp_path / "set"))
    assert open_source(str(tmp_path / "set" / "train*")).classes == ["c0", "c1"]


def test_shards_with_different_columns_or_kinds_are_rejected(tmp_path):
    table(tmp_path / "a" / "0.parquet", [0])
    table(tmp_path / "a" / "1.parquet", [1], label=None)
    with pytest.raises(SourceError, match=r"differ in the label column: 0\.parquet has label, 1\.parquet has none"):
        open_source(tmp_path / "a")
    table(tmp_path / "b" / "0.parquet", [0])
    tar_of(tmp_path / "b" / "1.tar", [("0.png", png(0))])
    with pytest.raises(SourceError, match=r"parquet and tar files \(0.parquet and 1.tar\)"):
        open_source(tmp_path / "b")


def folders(root, **names):
    for folder, files in names.items():
        for number, name in enumerate(files):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number + len(folder)))
    return root


def test_several_data_are_joined_to_one_source(tmp_path):
    folders(tmp_path, one=["a/0.png", "b/1.png"], two=["b/2.png", "c/3.png"])
    source = open_source([tmp_path / "one", tmp_path / "two"])
    assert source.names == ["a/0.png", "b/1.png", "b/2.png", "c/3.png"]
    assert [source.classes[label] for label in source.labels] == ["a", "b", "b", "c"]
    assert source.data == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert open_source(source.data).fingerprint() == source.fingerprint()
    assert source.changed is not None
    read_all(source)
    twice = open_source([str(tmp_path / "one"), "shapes:2", str(tmp_path / "one")])
    assert twice.names == ["one/a/0.png", "one/b/1.png", *(f"shapes:2/shapes-00000{i}" for i in (0, 1)),
                           "one-2/a/0.png", "one-2/b/1.png"]  # fmt: skip
    files = [tmp_path / "one" / "b" / "1.png", tmp_path / "one" / "a" / "0.png"]
    assert open_source(files).names == ["b/1.png", "a/0.png"]


def test_excluded_images_are_left_out_and_counted(tmp_path):
    folders(tmp_path, d=["a/0.png", "a/mask.png", "b/1.png", "thumbs/x/2.png"])
    source = open_source(tmp_path / "d", exclude=["thumbs", "*mask*", "nothing"])
    assert source.names == ["a/0.png", "b/1.png"]
    assert source.classes == ["a", "b"]
    assert source.excluded == {"thumbs": 1, "*mask*": 1, "nothing": 0}
    assert [source.read(row) for row in (0, 1)] == [png(1), png(3)]
    assert source.path(1) == os.path.join(str(tmp_path / "d"), "b/1.png")
    assert open_source(source.data, source.exclude).fingerprint() == source.fingerprint()
    with pytest.raises(SourceError, match="excludes all 4 images"):
        open_source(tmp_path / "d", exclude=["*.png"])


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.png", "a/b.png", True),
        ("*.png", "a/b.PNG", False),
        ("b", "a/b/c.png", True),
        ("b", "ab/c.png", False),
        ("a/*", "a/b/c.png", True),
        ("b/*", "a/b/c.png", False),
        ("**/b/*", "a/b/c.png", True),
        ("a/**/c.png", "a/c.png", True),
        ("a/**", "a/b/c.png", True),
        ("a/*.png", "a/b/c.png", False),
        ("[!a]*", "abc", False),
        ("im?.png", "x/im1.png", True),
        ("im(1).png", "im(1).png", True),
        ("im[[]1].png", "im[1].png", True),
        ("[a[b]", "[", True),
        ("[a&&b].png", "&.png", True),
    ],
)
def test_exclude_pattern_matches_the_expected_names(pattern, name, matches):
    assert matcher(pattern)(name) is matches


@pytest.mark.parametrize("pattern", ["[z-a].png", "[!]"])
def test_pattern_with_invalid_brackets_is_rejected(tmp_path, pattern):
    folders(tmp_path, d=["a/0.png", "b/1.png"])
    with pytest.raises(SourceError, match=r"with invalid brackets; expected a set of letters such as \[0-9\]"):
        open_source(tmp_path / "d", exclude=[pattern])


def test_folder_of_other_compressed_files_has_no_images(tmp_path):
    (tmp_path / "table.csv.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SourceError, match=r"contains no images \(but 1 \.gz\)"):
        open_source(tmp_path)
