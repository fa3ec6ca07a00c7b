"""Names of output files: safe on every system, distinct, and unchanged if they are ordinary."""

import os

import pytest

from unmask.data.files.csv_cells import marked, unmarked
from unmask.data.files.safe_names import safe_names

LONG = "x" * 300
HOSTILE = [
    "..", ".", "", "a/../../etc/passwd", "/etc/passwd", "C:\\a\\b.png", "a:b.png", "a?.png", "a*.png", "CON.png",
    "nul", "\x1b[31mred.png", LONG + ".png", LONG + ".jpg", "/".join([LONG] * 20) + "/a.png", "é" * 200 + ".png",
    "a/./b.png", "a/b.jpg", "A/B.png", "a.png/b.png", "a.png", "a.jpg", "A.JPG", "folder./x.png", "...", " ", "-2.png",
    "\udce9.png", "x/a.png", "x", "x.png/deep/y.png",
]  # fmt: skip


def test_ordinary_names_are_unchanged():
    names = ["a/0.jpg", "a/1.png", "b/v1.2.jpg", "b/ü 3.tif", "row-00000000", "a/0.png"]
    assert safe_names(names, ".png") == [
        "a/0.png", "a/1.png", "b/v1.2.png", "b/ü 3.png", "row-00000000.png", "a/0.png.png",
    ]  # fmt: skip


def test_names_are_safe_short_and_distinct(tmp_path):
    found = safe_names(HOSTILE * 2, ".png")
    assert len(set(map(str.casefold, found))) == len(found)
    root = os.path.realpath(tmp_path)
    for number, name in enumerate(found):
        assert name.endswith(".png")
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(str(number))
        assert os.path.realpath(place).startswith(root + os.sep)
        assert max(len(part.encode()) for part in name.split("/")) <= 143
        assert not set(name) & set('<>:"|?*\\\x1b')
    for number, name in enumerate(found):
        assert (tmp_path / name).read_text() == str(number), "no file overwrites another"


def test_many_equal_names_are_handled_quickly():
    assert len(set(safe_names([".."] * 20_000, ".png"))) == 20_000


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\nx", "'x", "'=x", "''", "\uff1d1"])
def test_marked_cells_are_not_formulas_and_can_be_unmarked(text):
    assert marked(text)[0] == "'"
    assert unmarked(marked(text)) == text


def test_cells_that_are_not_formulas_are_unchanged():
    for value in ("a", "", "1=2", "it's", -0.5, None):
        assert marked(value) == value
    for text in ("a", "it's", "'quoted'", ""):
        assert unmarked(text) == text
