"""Folders created by systems and tools are skipped in trees, globs, tars and zips."""

import tarfile
import zipfile
from pathlib import Path

import pytest
from corpus import file_of, noisy

from unmask.data.sources.open_source import open_source

PNG = file_of(noisy(8, 8), "PNG")
SYSTEM = (
    "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found",
    "@Recently-Snapshot", "@Recycle", ".Trash-1000", ".@__thumb", "__MACOSX", ".ipynb_checkpoints", "~snapshot",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for folder in ("cat", "dog", *SYSTEM, *(f"cat/{name}" for name in SYSTEM)):
        (root / folder).mkdir(parents=True)
        (root / folder / "a.png").write_bytes(PNG)
    return root


def as_tar(root):
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        archive.add(root, ".")
    return root.with_suffix(".tar")


def as_zip(root):
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for file in root.rglob("*.png"):
            archive.write(file, file.relative_to(root).as_posix())
    return root.with_suffix(".zip")


def deep(root):
    return f"{root}/**/*.png"


def shallow(root):
    return f"{root}/*/*.png"


@pytest.mark.parametrize("kind", [Path, as_tar, as_zip, deep, shallow])
def test_system_folders_are_skipped_and_counted(photos, kind):
    source = open_source(kind(photos))
    assert source.names == ["cat/a.png", "dog/a.png"]
    assert source.classes == ["cat", "dog"]
    assert source.skipped["system folder @eaDir"] in (1, 2)
    if kind(photos) == photos:
        assert source.skipped == {f"system folder {name}": 2 for name in SYSTEM}


def test_system_folders_match_any_case_but_possible_class_names_are_kept(tmp_path):
    for folder in ("@EADIR", "$Recycle.Bin", "recycled", "trash", "thumbs", "found"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(PNG)
    assert set(open_source(tmp_path).classes) == {"found", "recycled", "trash", "thumbs"}


def test_system_folder_given_by_name_is_read(photos):
    assert open_source(photos / "lost+found").names == ["a.png"]
    assert open_source(f"{photos}/@eaDir/*.png").names == ["a.png"]
