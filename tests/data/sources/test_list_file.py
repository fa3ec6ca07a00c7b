"""Real-world list files: encodings, quotes, header rows, and several spellings of one class."""

import unicodedata

import pytest
from corpus import file_of, noisy

from unmask.data.annotations.labels import require_labels
from unmask.data.sources.open_source import open_source
from unmask.errors import SourceError

PNG = file_of(noisy(8, 8), "PNG")


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "b.png", "c, d.png", 'e "f".png', "ü.png"):
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


def listed(root, content, name="list.txt"):
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(root / name)


def texts(source):
    return [source.classes[label] for label in source.labels]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_are_read_in_every_unicode_encoding(root, encoding, end):
    source = listed(root, end.join(["a.png,Katze", "ü.png,Vögel", ""]).encode(encoding))
    assert list(source.names) == ["a.png", "ü.png"]
    assert texts(source) == ["Katze", "Vögel"]
    assert source.read(1) == PNG


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a.png,cat\nb.png,Vögel\n".encode("cp1252"), r"line 2 of .*list\.txt is not UTF-8: b\.png,V\\xf6gel; .*iconv"),
        ("a.png,cat\nb.png,鳥\n".encode("shift_jis"), r"line 2 of .* is not UTF-8"),
        (b"a.png,cat\nb.png,do\0g\n", r"line 2 of .* contains a NUL character"),
        ("a.png,cat\n".encode("utf-16") + b"\x00", r"line 2 of .* is not valid UTF-16-LE"),
        (b"gone\xe9.png\na.png\n", r"line 1 of .* is not UTF-8"),
        (b'a.png,"cat\nb.png,dog\n', r"line 1 of .* has unbalanced quotes"),
    ],
)
def test_undecodable_line_is_rejected_with_its_number(root, content, said):
    with pytest.raises(SourceError, match=said):
        listed(root, content)


def test_path_may_contain_bytes_that_are_not_utf_8(root):
    name = b"caf\xe9.png"
    try:
        (root.__fspath__().encode() + b"/" + name).decode("utf-8", "surrogateescape")
        with open(root.__fspath__().encode() + b"/" + name, "wb") as file:
            file.write(PNG)
    except OSError:
        pytest.skip("this file system takes no such name")
    source = listed(root, name + b",cat\na.png,dog\n")
    assert list(source.names) == ["caf\\xe9.png", "a.png"]
    assert source.read(0) == PNG
    assert texts(source) == ["cat", "dog"]


def test_cells_follow_the_rules_of_csv(root):
    source = listed(root, 'a.png,"cats, dogs"\n"c, d.png","say ""hi"""\n"e ""f"".png",12" disc\nb.png,plain\n')
    assert list(source.names) == ["a.png", "c, d.png", 'e "f".png', "b.png"]
    assert texts(source) == ["cats, dogs", 'say "hi"', '12" disc', "plain"]
    assert texts(listed(root, "a.png;cat\nb.png;dog\n", "list.csv")) == ["cat", "dog"]
    assert texts(listed(root, '"a.png"\t"big cat"\nb.png\tdog\n')) == ["big cat", "dog"]
    two_lines = listed(root, 'path,label\na.png,"two\nlines"\nb.png,one\n', "list.csv")
    assert texts(two_lines) == ["two\\nlines", "one"]
    with pytest.raises(SourceError, match=r"line 2 of .*list\.csv has a quote that is never closed"):
        listed(root, 'path,label\na.png,"cat\nb.png,dog\n', "list.csv")


def test_columns_are_found_by_the_header_row(root):
    source = listed(root, "label,score,image_path\ncat,0.5,a.png\ndog,0.25,b.png\n", "list.csv")
    assert list(source.names) == ["a.png", "b.png"]
    assert texts(source) == ["cat", "dog"]
    assert listed(root, "path,width,height\na.png,8,8\nb.png,8,8\n", "list.csv").labels is None
    with pytest.raises(SourceError, match=r"line 3 of .* has 1 cells"):
        listed(root, "score,path\n1,a.png\n2\n", "list.csv")


def test_whole_numbers_are_sorted_as_numbers_and_fractions_are_not_classes(root):
    assert listed(root, "a.png 10\nb.png 9\nü.png -1\n").classes == ["-1", "9", "10"]
    source = listed(root, "a.png,0.5\nb.png,1.25\n")
    assert source.labels is None
    with pytest.raises(SourceError, match=r"labels are fractions such as 0\.5, 1\.25, .* --targets"):
        require_labels(source)


def test_unicode_spellings_of_a_class_name_are_one_class(root):
    composed = unicodedata.normalize("NFC", "Vögel")
    decomposed = unicodedata.normalize("NFD", "Vögel")
    assert composed != decomposed
    assert listed(root, f"a.png,{composed}\nb.png,{decomposed}\nü.png,cat\n").classes == ["Vögel", "cat"]
    for name in ("cat", composed, decomposed):
        (root / "tree" / name).mkdir(parents=True)
        (root / "tree" / name / f"{len(name)}.png").write_bytes(PNG)
    source = open_source(root / "tree")
    assert source.classes == [composed, "cat"]
    assert len(source) == 3
    assert decomposed in {name.split("/")[0] for name in source.names}, "file names are not normalised"


def test_control_characters_in_class_names_are_escaped(root):
    source = listed(root, "a.png,\x1b[31mred\nb.png,plain\n")
    assert sorted(source.classes) == ["\\x1b[31mred", "plain"]


@pytest.mark.parametrize("line", ["a.png,", '"a.png",""'])
def test_empty_label_counts_as_missing(root, line):
    with pytest.raises(
        SourceError, match=r"1 of 2 lines .* have a label, but others do not, for example a\.png in line 1"
    ):
        listed(root, f"{line}\nb.png,cat\n")
