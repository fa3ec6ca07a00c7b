"""Names of run folders and result files."""

from pathlib import Path

import pytest

from unmask.system.plain_names import default_folder, plain_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/my birds.tar.gz", "my-birds-tar-gz"),
        ("shapes:8", "shapes-8"),
        ("*.png", "png"),
        ("größe", "größe"),
        ("", ""),
    ],
)
def test_a_plain_name_has_only_letters_digits_and_hyphens(path, name):
    assert plain_name(path) == name


def test_the_default_folder_is_named_after_the_images():
    assert default_folder("data/my birds.tar.gz", "mae_nano") == Path("runs/my-birds-mae_nano")
    assert default_folder("data/*.png", "table-1a") == Path("runs/images-table-1a")
