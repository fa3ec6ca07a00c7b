"""Sources: kinds of DATA, names and labels, and malicious or damaged trees, lists and archives."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import signal
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_images
from corpus import file_of, noisy, npy

from unmask.data import limits
from unmask.data.annotations.labels import require_labels
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.decode import decode
from unmask.data.files.string_table import StringTable
from unmask.data.sources.image_files import open_files
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import printable
from unmask.errors import SourceError

PNG = file_of(noisy(8, 8), "PNG")


def put(folder: Path, *names: str, content: bytes = PNG) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def numbered(i: int) -> bytes:
    return file_of(noisy(8, 8, seed=i), "PNG")


def refusal(data) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(data)
    return str(caught.value)


def reason(source, row: int = 0) -> str:
    with pytest.raises(BadImage) as caught:
        decode(source.read(row))
    return caught.value.code


@pytest.fixture(autouse=True)
def no_hang():
    """Make a test that blocks on a pipe fail instead of waiting forever."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_tree_is_sorted_and_labelled_by_folders(tmp_path):
    source = open_source(put(tmp_path, "b/2.png", "a/10.png", "a/1.JPG", "b/x/y.webp"))
    assert source.names == ["a/1.JPG", "a/10.png", "b/2.png", "b/x/y.webp"]
    assert source.classes == ["a", "b"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.sizes.tolist() == [len(PNG)] * 4
    assert source.read(2) == PNG


def test_skipped_files_and_system_folders_are_counted_but_hidden_files_are_not(tmp_path):
    put(tmp_path, "a.png", "b.txt", "c.txt", "noextension", ".hidden.png", ".git/d.png", "__MACOSX/e.png", ".DS_Store")
    source = open_source(tmp_path)
    assert source.names == ["a.png"]
    assert source.skipped == {".txt": 2, "": 1, "system folder __MACOSX": 1}


def test_folders_without_images_are_rejected(tmp_path):
    assert "it is empty" in refusal(tmp_path)
    put(tmp_path, "a.txt", "b.txt", "c.pdf", "README")
    message = refusal(tmp_path)
    assert "2 .txt" in message
    assert "1 without extension" in message
    assert ".jpg" in message


def test_error_for_a_missing_path_suggests_a_similar_name(tmp_path):
    put(tmp_path, "flowers/a.png")
    assert "did you mean" in refusal(tmp_path / "flower")
    assert str(tmp_path / "flowers") in refusal(tmp_path / "flower")
    assert "does not exist" in refusal(tmp_path / "nowhere" / "at" / "all")
    assert "shapes" in refusal("shape")


def test_names_that_no_file_can_have_are_rejected():
    for data in ("x" * 5000, "a\0b", ""):
        with pytest.raises(SourceError):
            open_source(data or "no-such-thing")


@pytest.mark.parametrize("links", [1, 3])
def test_cyclic_links_are_followed_once(tmp_path, links):
    put(tmp_path, "real/a.png", "real/deep/b.png")
    for i in range(links):
        (tmp_path / "real" / f"loop{i}").symlink_to(tmp_path / "real", target_is_directory=True)
        (tmp_path / f"also{i}").symlink_to(tmp_path / "real", target_is_directory=True)
    source = open_source(tmp_path)
    assert source.names == ["real/a.png", "real/deep/b.png"]
    assert source.skipped["folder seen before"] == 2 * links
    assert open_source(f"{tmp_path}/**/*.png").names == ["a.png", "deep/b.png"]


def test_linked_files_are_read_and_broken_links_are_counted(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "d.png").symlink_to(tmp_path / "d.png")
    source = open_source(tmp_path)
    assert source.names == ["a.png", "b.png"]
    assert source.skipped == {"broken link": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_never_opened(tmp_path):
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    source = open_source(tmp_path)
    assert source.names == ["a.png"]
    assert source.skipped == {"not a regular file": 1}
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    listed = open_source(tmp_path / "list.txt")
    assert reason(listed, 1) == "NOT_IMAGE"
    assert "neither a file nor a folder" in refusal(tmp_path / "b.png")


@pytest.mark.skipif(sys.platform == "darwin" or os.name == "nt", reason="file names must be text on this system")
def test_names_that_are_not_utf_8_can_be_read_and_printed(tmp_path):
    put(tmp_path, "a.png")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))).write_bytes(PNG)
    (tmp_path / "line\nfeed\x1b[2J.png").write_bytes(PNG)
    source = open_source(tmp_path)
    assert source.names == ["a.png", r"caf\xe9.png", r"line\x0afeed\x1b[2J.png"]
    assert all(source.read(i) == PNG for i in range(3))
    "\n".join(source.names).encode("utf-8")
    assert len(source.fingerprint()) == 64


def test_printable_does_not_change_ordinary_names():
    assert printable("Ünï côdé/日本 (1).jpg") == "Ünï côdé/日本 (1).jpg"


ODD = ["a/1.png", "", "Ünï/日本.jpg", "caf\udce9.png", "half\ud800", "\U0001f600", "a/1.png"]


@pytest.mark.parametrize("texts", [ODD, ["plain", "text", "x"], []])
def test_string_table_reads_like_a_list(texts):
    names = StringTable(texts)
    again = pickle.loads(pickle.dumps(names))
    for one in (names, again, StringTable.stored(names.blob, names.ends)):
        assert one == texts
        assert texts == one
        assert list(one) == texts
        assert [one[i] for i in range(-len(texts), len(texts))] == texts * 2
        assert one[1:] == texts[1:]
        assert one[::-2] == texts[::-2]
        assert len(one) == len(texts)
    for row in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            names[row]
    assert names != [*texts, "more"]
    assert StringTable([*texts[:-1], "other"]) != texts


def test_index_needs_few_bytes_per_file(tmp_path):
    put(tmp_path, *(f"class{i % 5}/a-usual-name-{i:06d}.jpg" for i in range(2000)), content=b"")
    tracemalloc.start()
    try:
        source = open_source(tmp_path)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 2000
    assert taken / 2000 < 120, "names of 34 letters, sizes, dates and labels; a list of str takes 190 more"


def test_very_deep_trees_do_not_exhaust_the_stack(tmp_path):
    here, deep = os.getcwd(), 1500
    try:
        os.chdir(tmp_path)
        for _ in range(deep):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").write_bytes(PNG)
        assert open_source(tmp_path).names[0].count("/") == deep
        Path("a.png").unlink()
        for _ in range(deep):  # pytest cannot remove such a deep tree
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)


def test_folders_without_permission_are_counted(tmp_path, monkeypatch):
    put(tmp_path, "a.png", "closed/b.png")
    listing = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError
        return listing(path)

    monkeypatch.setattr(os, "scandir", closed)  # file modes do not restrict root
    source = open_source(tmp_path)
    assert source.names == ["a.png"]
    assert source.skipped == {"folder without permission": 1}


def test_unreadable_and_missing_files_raise_bad_image(tmp_path, monkeypatch):
    source = open_source(put(tmp_path, "a.png", "b.png", "c.png"))
    (tmp_path / "b.png").unlink()
    assert reason(source, 1) == "VANISHED"
    (tmp_path / "b.png").mkdir()
    assert reason(source, 1) == "NOT_IMAGE"

    def closed(*_):
        raise PermissionError

    monkeypatch.setattr("builtins.open", closed)
    assert reason(source, 0) == "PERMISSION"


def test_too_large_file_is_not_read(tmp_path):
    put(tmp_path, "a.png")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(limits.MAX_FILE_BYTES + 1)
    assert reason(open_source(tmp_path), 1) == "TOO_LARGE_FILE"


def test_time_of_change_of_each_file_is_recorded(tmp_path):
    put(tmp_path, "a.png", "b.png")
    source = open_source(tmp_path)
    times = [os.stat(tmp_path / name) for name in source.names]
    assert source.changed is not None
    assert source.changed.tolist() == [max(found.st_mtime_ns, found.st_ctime_ns) for found in times]
    (tmp_path / "list.txt").write_text("b.png\ngone.png\n")
    listed = open_source(tmp_path / "list.txt").changed
    assert listed is not None
    assert listed.tolist() == [source.changed[1], -1]
    assert open_source("shapes:2").changed is None


def test_fingerprint_depends_on_names_and_sizes(tmp_path):
    put(tmp_path / "fixed", "a/1.png", "ü.png", content=b"12345")
    value = open_source(tmp_path / "fixed").fingerprint()
    assert value == hashlib.sha256("a/1.png\0005\nü.png\0005\n".encode()).hexdigest(), (
        "existing runs store this value, so it must not change"
    )
    shutil.rmtree(tmp_path / "fixed")
    first = open_source(put(tmp_path, "a.png", "b.png")).fingerprint()
    assert open_source(tmp_path).fingerprint() == first
    put(tmp_path, "b.png", content=PNG + b"\0")
    changed = open_source(tmp_path).fingerprint()
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({first, changed, open_source(tmp_path).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["x/a/1.png", "x/b/1.png"], ["a", "b"]),
        (["a/1.png", "b/1.png", "c.png"], []),
        (["a/1.png"], []),
        (["train/a/1.png", "val/a/1.png"], []),
        (["Train/1.png", "TEST/1.png"], []),
    ],
)
def test_classes_are_the_first_level_with_several_folders(tmp_path, names, classes):
    assert open_source(put(tmp_path, *names)).classes == classes


def test_splits_are_not_classes_and_the_error_names_a_split_folder(tmp_path):
    source = open_source(put(tmp_path, "train/a/1.png", "val/a/1.png"))
    with pytest.raises(SourceError, match=r"splits, not classes.*/val"):
        require_labels(source)
    with pytest.raises(SourceError, match="no class labels"):
        require_labels(open_source(put(tmp_path / "flat", "1.png")))
    put(tmp_path, "train/b/1.png")
    assert require_labels(open_source(tmp_path / "train")).classes == ["a", "b"]


def test_numeric_class_names_are_sorted_as_numbers(tmp_path):
    source = open_source(put(tmp_path, "a.png"))
    source.label_by(["10", "9", "2"])
    assert source.classes == ["2", "9", "10"]
    assert source.labels is not None
    assert source.labels.tolist() == [2, 1, 0]


def test_list_may_have_labels_comments_and_a_header_row(tmp_path):
    put(tmp_path, "images/a.png", "images/b c.png", "other/d.png")
    for text in (
        "path,label\nimages/a.png,cat\n# no\n\nimages/b c.png,dog\r\n../X/other/d.png,cat\n",
        "\ufeffimages/a.png\tcat\nimages/b c.png\tdog\nother/d.png\tcat",
        f'"images/a.png","cat"\n"{tmp_path}/images/b c.png",dog\nother/d.png,cat\n',
        "images/a.png cat\nimages/b c.png dog\nother/d.png cat\n",
    ):
        (tmp_path / "list.csv").write_text(text.replace("../X", f"../{tmp_path.name}"), encoding="utf-8", newline="")
        source = open_source(tmp_path / "list.csv")
        assert source.names == ["images/a.png", "images/b c.png", "other/d.png"]
        assert source.classes == ["cat", "dog"]
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 0]
        assert source.read(1) == PNG


def test_list_without_labels_is_labelled_by_folders(tmp_path):
    put(tmp_path, "x/a.png", "y/b.png")
    (tmp_path / "list.txt").write_text("y/b.png\nx/a.png\n")
    source = open_source(tmp_path / "list.txt")
    assert source.names == ["y/b.png", "x/a.png"]
    assert source.classes == ["x", "y"]


def test_list_with_missing_labels_is_rejected(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text("a.png,cat\nb.png\n")
    assert "1 of 2 lines" in refusal(tmp_path / "list.txt")


def test_missing_files_of_a_list_are_listed_unless_all_are_missing(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text("a.png\ngone.png\n")
    source = open_source(tmp_path / "list.txt")
    assert len(source) == 2
    assert reason(source, 1) == "VANISHED"
    (tmp_path / "list.txt").write_text("x.png\ny.png\n")
    assert "none of the 2 files" in refusal(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("# nothing\n")
    assert "contains no images" in refusal(tmp_path / "list.txt")


def test_globs_list_the_matching_files(tmp_path, monkeypatch):
    put(tmp_path, "x/a1.png", "x/a2.jpg", "x/b1.png", "y/a1.png", "y/deep/a3.png", "y/a.txt", ".h/a1.png")
    found = lambda pattern: open_source(f"{tmp_path}/{pattern}").names  # noqa: E731
    assert found("*/a1.png") == ["x/a1.png", "y/a1.png"]
    assert found("x/a?.*") == ["a1.png", "a2.jpg"]
    assert found("**/a[13].png") == ["x/a1.png", "y/a1.png", "y/deep/a3.png"]
    assert found("y/**") == ["a1.png", "deep/a3.png"]
    assert found("**/deep/*") == ["a3.png"]
    assert open_source(f"{tmp_path}/*/a1.png").classes == ["x", "y"]
    assert open_source(f"{tmp_path}/y/*").skipped == {".txt": 1}
    assert "does not match any file" in refusal(f"{tmp_path}/z*")
    assert "1 .txt" in refusal(f"{tmp_path}/y/*.txt")
    (tmp_path / "odd[1]").mkdir()
    monkeypatch.chdir(put(tmp_path / "odd[1]", "a.png", "b.png"))
    source = open_source("*.png")
    monkeypatch.chdir(tmp_path)
    assert open_source(source.location).names == ["a.png", "b.png"]


def test_folder_with_wildcards_in_its_name_is_a_folder(tmp_path):
    assert len(open_source(put(tmp_path / "set [1]*", "a.png"))) == 1


def test_single_files_can_be_opened(tmp_path, monkeypatch):
    put(tmp_path, "x/b.png", "x/a.png")
    files = open_files([tmp_path / "x/b.png", tmp_path / "x/a.png"])
    assert files.names == ["b.png", "a.png"]
    monkeypatch.chdir(tmp_path / "x")
    source = open_source("a.png")
    monkeypatch.chdir(tmp_path)
    assert open_source(source.location).names == ["a.png"]
    with pytest.raises(SourceError, match="is not a file"):
        open_files([tmp_path / "gone.png"])
    put(tmp_path, "data.xyz")
    assert "an unknown kind" in refusal(tmp_path / "data.xyz")


def make_tar(path: Path, members, mode: str = "w", **options) -> Path:
    with tarfile.open(path, mode, **options) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


TEN = [(f"x/{'ab'[i % 2]}/{i}.png", numbered(i)) for i in range(10)]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("d.tar", "w"),
        ("d.tar.gz", "w:gz"),
        ("d.tgz", "w:gz"),
        ("d.tar.xz", "w:xz"),
        ("d.tar.bz2", "w:bz2"),
        ("compressed.tar", "w:gz"),
        ("plain.tar.gz", "w"),
    ],
)
def test_images_in_a_tar_are_read(tmp_path, name, mode):
    source = open_source(make_tar(tmp_path / name, TEN, mode))
    assert source.names == sorted(name for name, _ in TEN)
    assert source.classes == ["a", "b"]
    again = pickle.loads(pickle.dumps(source))
    for row, name in enumerate(source.names):
        assert source.read(row) == again.read(row) == dict(TEN)[name]


def test_leading_dot_folder_in_tar_names_is_removed(tmp_path):
    source = open_source(make_tar(tmp_path / "d.tar", [(f"./{name}", content) for name, content in TEN]))
    assert source.names == sorted(name for name, _ in TEN)
    assert source.classes == ["a", "b"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_members_cannot_lead_outside_the_archive(tmp_path, mode):
    secret = put(tmp_path, "secret.png").joinpath("secret.png")
    odd = []
    for kind, target in ((tarfile.SYMTYPE, str(secret)), (tarfile.LNKTYPE, "a.png"), (tarfile.FIFOTYPE, "")):
        info = tarfile.TarInfo(f"link{len(odd)}.png")
        info.type, info.linkname = kind, target
        odd.append((info, b""))
    members = [
        ("a.png", PNG),
        *odd,
        ("../../escape.png", PNG),
        ("b/../../c.png", PNG),
        ("/etc/d.png", PNG),
        (".h.png", PNG),
    ]
    box = tmp_path / "box"
    box.mkdir()
    before = sorted(tmp_path.rglob("*"))
    archive = make_tar(box / "d.tar", members, mode)
    source = open_source(archive)
    assert source.names == ["/etc/d.png", "a.png", "link1.png"]
    told = {"not a regular file": 1, "link to nothing in the archive": 1, "path that leaves the archive": 2}
    assert source.skipped == told
    assert [source.read(i) for i in range(3)] == [PNG, PNG, PNG]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, archive])
    assert not Path("/etc/d.png").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_tar_is_rejected(tmp_path, mode, share):
    many = [(f"{i:02d}.png", np.random.default_rng(i).bytes(5000)) for i in range(40)]
    path = make_tar(tmp_path / "d.tar", many, mode)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    # xz may have only one block, so that no image can be read.
    told = "damaged or truncated after its first .* images.*copy it again" + "|cannot be read" * (mode == "w:xz")
    with pytest.raises(SourceError, match=told):
        open_source(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_truncated_between_two_images_is_rejected(tmp_path, mode):
    plain = make_tar(tmp_path / "plain.tar", TEN)
    with tarfile.open(plain) as archive:
        place = archive.getmembers()[5].offset
    data = plain.read_bytes()[:place]
    path = tmp_path / "d.tar"
    path.write_bytes(gzip.compress(data) if mode == "w:gz" else data)
    with pytest.raises(SourceError, match=r"truncated after its first 5 images \(the last is"):
        open_source(path)


def test_damaged_gzip_stream_is_detected(tmp_path):
    path = make_tar(
        tmp_path / "d.tar.gz", [(f"{i:02d}.png", np.random.default_rng(i).bytes(5000)) for i in range(40)], "w:gz"
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = b"\xff" * 300
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged or truncated"):
        open_source(path)


def test_damaged_tar_header_is_not_treated_as_the_end(tmp_path):
    path = make_tar(tmp_path / "d.tar", TEN)
    with tarfile.open(path) as archive:
        place = archive.getmembers()[5].offset
    data = bytearray(path.read_bytes())
    data[place + 150] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="after its first 5 images"):
        open_source(path)


@pytest.mark.parametrize("name", ["d.tar", "d.tar.gz", "d.zip", "d.parquet"])
def test_file_that_is_not_an_archive_is_rejected(tmp_path, name):
    for content in (b"", b"hello" * 200, b"\x1f\x8b" + b"\0" * 50, b"PK\3\4" + b"\0" * 50, b"PAR1" + b"\0" * 50):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(tmp_path / name)


def test_compressed_tar_above_the_memory_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 1000)
    assert "unpack it" in refusal(make_tar(tmp_path / "d.tar.gz", TEN, "w:gz"))


def test_missing_or_truncated_archives_raise_bad_image(tmp_path):
    path = make_tar(tmp_path / "d.tar", TEN)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert reason(source, 9) == "EMPTY"
    path.unlink()
    assert reason(source) == "VANISHED"


def make_zip(path: Path, members, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_members_are_read_and_bad_ones_raise_bad_image(tmp_path, compression):
    path = make_zip(tmp_path / "d.zip", TEN, compression=compression)
    source = open_source(path)
    assert source.names == sorted(name for name, _ in TEN)
    assert source.classes == ["a", "b"]
    again = pickle.loads(pickle.dumps(source))
    assert all(source.read(i) == again.read(i) == dict(TEN)[name] for i, name in enumerate(source.names))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(source.names[0])
    data = bytearray(path.read_bytes())
    place = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    data[place : place + 8] = b"\xff\x00\xff\x00\xff\x00\xff\x00"
    path.write_bytes(data)
    with pytest.raises(BadImage) as caught:
        open_source(path).read(0)
    assert caught.value.code in ("CORRUPT", "TRUNCATED")
    assert open_source(path).read(1) == dict(TEN)[source.names[1]]


def test_links_duplicates_and_traversal_in_a_zip_are_skipped(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about the duplicate name
        members = [("a.png", b"old"), ("a.png", PNG), (link, "/etc/passwd"), ("../b.png", PNG)]
        members += [("__MACOSX/a.png", PNG), ("notes.txt", b""), ("folder/", b"")]
        path = make_zip(tmp_path / "d.zip", members)
    source = open_source(path)
    assert source.names == ["a.png"]
    assert source.read(0) == PNG
    assert source.skipped == {
        "not a regular file": 1,
        "path that leaves the archive": 1,
        ".txt": 1,
        "system folder __MACOSX": 1,
        "replaced by a later member of the same name": 1,
    }


def test_encrypted_and_unsupported_zip_members_raise_bad_image(tmp_path):
    path = make_zip(tmp_path / "d.zip", [("a.png", PNG)])
    data = path.read_bytes()
    central = data.index(b"PK\1\2")
    for offset, value, code in ((8, 1, "PERMISSION"), (10, 97, "FORMAT_NOT_ALLOWED")):
        changed = bytearray(data)
        changed[central + offset] = value
        changed[offset - 2] = value
        path.write_bytes(changed)
        assert reason(open_source(path)) == code
    source = open_source(path)
    path.unlink()
    assert reason(source) == "VANISHED"


def test_too_large_members_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    big = b"\0" * 1001
    assert "1 member too large" in refusal(make_zip(tmp_path / "d.zip", [("a.png", big)]))
    assert "1 member too large" in refusal(make_tar(tmp_path / "d.tar", [("a.png", big)]))


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_bytes_or_structs_is_read(tmp_path, struct):
    images = [numbered(i) for i in range(12)]
    column = [{"bytes": data, "path": f"p{i}.png"} for i, data in enumerate(images)] if struct else images
    table = pa.table({"image": column, "label": [11 - i for i in range(12)]})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=5)
    source = open_source(tmp_path / "d.parquet")
    assert source.names[0] == ("p0.png" if struct else "row-00000000")
    assert source.classes == [str(i) for i in range(12)]
    assert source.labels is not None
    assert source.labels.tolist() == list(range(11, -1, -1))
    again = pickle.loads(pickle.dumps(source))
    for row in (11, 0, 5, 4, 11):
        assert source.read(row) == again.read(row) == images[row]


def test_cached_parquet_groups_respect_the_limit(tmp_path, monkeypatch):
    images = [np.random.default_rng(i).bytes(1000) for i in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "d.parquet", row_group_size=10)
    source = open_source(tmp_path / "d.parquet")
    reads = []
    true_read = type(source)._read_group  # type: ignore[attr-defined]
    monkeypatch.setattr(type(source), "_read_group", lambda self, group: reads.append(group) or true_read(self, group))
    for row in (0, 39, 1, 38, 15, 25, 2):
        assert source.read(row) == images[row]
    assert reads == [0, 3, 1, 2]
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 25_000)
    for row in (0, 39, 1, 15, 39):
        assert source.read(row) == images[row]
    assert len(source.groups) == 2  # type: ignore[attr-defined]


def test_unusable_parquet_files_are_rejected(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"number": [1, 2]}), path)
    assert "has no column of image bytes, only number" in refusal(path)
    pq.write_table(pa.table({"img": [PNG, None, b""], "file": ["a", "b", "c"]}), path)
    source = open_source(path)
    assert source.names == ["a", "b", "c"]
    assert source.labels is None
    assert [reason(source, row) for row in (1, 2)] == ["EMPTY", "EMPTY"]
    first = source.fingerprint()
    pq.write_table(pa.table({"img": [PNG, None, PNG], "file": ["a", "b", "c"]}), path)
    assert open_source(path).fingerprint() != first
    pq.write_table(pa.table({"img": [PNG, PNG], "label": ["x", None]}), path)
    assert "no label in 1 of 2 rows" in refusal(path)
    source = open_source(put_table(path))
    path.unlink()
    assert reason(source) == "VANISHED"


def put_table(path: Path) -> Path:
    pq.write_table(pa.table({"image": [PNG]}), path)
    return path


def test_embedded_sets_are_small_labelled_and_decodable():
    digits, test = open_source("digits"), open_source("digits-test")
    assert len(digits) + len(test) == 1797
    assert not set(digits.names) & set(test.names)
    assert decode(digits.read(0)).shape == (8, 8, 1)
    shapes = open_source("shapes:20")
    assert len(shapes) == 20
    assert shapes.labels is not None
    assert decode(shapes.read(3)).shape[2] == 3
    assert open_source(shapes.location).fingerprint() == shapes.fingerprint()


@pytest.mark.parametrize("data", ["shapes:x", "shapes:0", "shapes:-5", "shapes:99999999", "digits:5"])
def test_invalid_parts_of_embedded_sets_are_rejected(data):
    assert data in refusal(data)


def test_folder_named_like_an_embedded_set_has_priority(tmp_path, monkeypatch):
    put(tmp_path / "shapes", "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_source("shapes").names == ["a.png"]


def test_npy_files_are_images(tmp_path):
    put(tmp_path, "a.npy", content=npy(noisy(6, 5, 7)))
    assert decode(open_source(tmp_path).read(0)).shape == (6, 5, 7)


def test_a_compressed_tar_with_a_folder_for_each_class_is_labelled(tmp_path):
    """Uses the layout of common CIFAR-10 archives: cifar/test/airplane/0000.png, one class after the other."""
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    archive = tmp_path / "test.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for label, name in enumerate(classes):
            for number in range(5 + label):
                data = file_of(noisy(8, 8, seed=label), "PNG")
                member = tarfile.TarInfo(f"cifar/test/{name}/{number:04d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = open_source(archive)
    assert len(source) == sum(range(5, 15))
    assert source.classes == classes
    assert np.bincount(require_labels(source).labels).tolist() == list(range(5, 15))  # type: ignore[arg-type]


def test_run_folder_inside_the_data_is_skipped(tmp_path):
    write_images(tmp_path / "photos", 3)
    before = open_source(tmp_path / "photos").fingerprint()
    run = tmp_path / "photos" / "runs" / "a"
    write_images(run / "pictures", 2)
    for name in ("config.json", "plan.json"):
        (run / name).write_text("{}")
    after = open_source(tmp_path / "photos")
    assert len(after) == 3
    assert after.skipped["run folder"] == 1
    assert after.fingerprint() == before
