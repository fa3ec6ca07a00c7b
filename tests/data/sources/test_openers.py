"""Every kind of data is recognised by exactly one opener, and every file format by exactly one decoder."""

import pytest

from unmask.data.decode.decode import FILE_FORMATS
from unmask.data.sources.image_files import EXTENSIONS
from unmask.data.sources.list_file import LISTS
from unmask.data.sources.open_source import FILE_OPENERS, OPENERS
from unmask.data.sources.tar_file import TARS

FILES = [f"x{ending}" for ending in (*EXTENSIONS, *LISTS, *TARS, ".zip", ".parquet", ".pq")]


@pytest.mark.parametrize("text", [*FILES, *(name.upper() for name in FILES)])
def test_each_file_name_is_recognised_by_one_opener(text):
    assert sum(opener.opens(text) for opener in FILE_OPENERS) == 1


@pytest.mark.parametrize("text", ["shapes", "digits-test", "shapes:20", "photos/*.jpg", "photos/**"])
def test_data_other_than_files_are_recognised_by_one_opener(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sum(opener.opens(text) for opener in OPENERS) == 1
    assert sum(opener.opens(str(tmp_path)) for opener in OPENERS) == 1


def test_formats_do_not_accept_each_others_files_or_names():
    names = [name for one in FILE_FORMATS for name in one.names]
    assert len(names) == len(set(names))
    starts = [start for one in FILE_FORMATS for start in one.starts]
    assert not [(a, b) for a in starts for b in starts if a is not b and a.startswith(b)]
    assert [one for one in FILE_FORMATS if not one.starts] == [FILE_FORMATS[-1]]  # the last format accepts any bytes
