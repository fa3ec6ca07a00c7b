"""Tables of targets: inferring the task from the columns, pairing rows with images, and errors."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import file_of, noisy

from unmask.data.annotations.label_tables import meaning_of, read_table, targets_of
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.errors import UserError


class Named(Source):
    """A source that only has names."""

    def __init__(self, *names):
        super().__init__("images", names, np.zeros(len(names)))

    def read(self, i):
        raise AssertionError("pixels must not be read")


SOURCE = Named("a/1.png", "a/2.png", "b/3.png", "b/4.png")


def written(folder, text, name="t.csv"):
    file = folder / name
    file.write_text(text)
    return file


def targets(file, source=SOURCE, *, columns=None, task=None, classes=None):
    table = read_table(file, columns)
    return targets_of(table, source, meaning_of(table, task), classes=classes)


def test_text_column_becomes_classes(tmp_path):
    file = written(tmp_path, "\ufeffpath,kind\nb/4.png,owl\na/1.png,cat\n./b/3.png, cat\nz.png,dog\n")
    found = targets(file)
    assert (found.task, found.classes) == ("classes", ["cat", "owl"]), "dog has no image"
    assert found.rows.tolist() == [0, 2, 3]
    assert found.values.tolist() == [0, 0, 1]
    assert found.left_out == 1
    assert found.unused == ("z.png",)
    assert "texts: kind" in found.why


def test_whole_numbers_are_classes_unless_regression_is_requested(tmp_path):
    file = written(tmp_path, "path,size\na/1.png,10\na/2.png,9\nb/3.png,-2\nb/4.png,9\n")
    found = targets(file)
    assert (found.task, found.classes, found.values.tolist()) == ("classes", ["-2", "9", "10"], [2, 1, 0, 1])
    asked = targets(file, task="regression")
    assert asked.values.tolist() == [[10.0], [9.0], [-2.0], [9.0]]
    assert asked.columns == ("size",)
    assert asked.why.startswith("regression, as requested")


def test_columns_of_0_and_1_are_multilabel_and_fractions_are_regression(tmp_path):
    rows = ["path,old,red,age", "a/1.png,1,0,3.5", "a/2.png,0,0,4", "b/3.png,0,1,5"]
    file = written(tmp_path, "\n".join(rows))
    many = targets(file, columns=["red", "old"])
    assert (many.task, many.columns) == ("multilabel", ("red", "old"))
    assert many.values.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert targets(file).task == "regression"
    assert targets(file).values.shape == (3, 3)
    one = targets(file, columns=["old"])
    assert (one.task, one.classes) == ("classes", ["0", "1"])
    assert targets(file, columns=["old"], task="multilabel").values.shape == (3, 1)


def test_parquet_and_csv_give_the_same_targets(tmp_path):
    columns = {"path": ["a/1.png", "b/3.png"], "n": [1.5, 2.25], "seen": [True, False], "word": ["x", "y"]}
    pq.write_table(pa.table({**columns, "bytes": [b"1", b"2"]}), tmp_path / "t.parquet")
    written(tmp_path, "path,n,seen,word\na/1.png,1.5,1,x\nb/3.png,2.25,0,y\n")
    for names, task in ((["n"], "regression"), (["word"], "classes"), (["n", "seen"], "regression")):
        both = [targets(tmp_path / f"t.{kind}", columns=names) for kind in ("csv", "parquet")]
        assert [found.task for found in both] == [task] * 2
        np.testing.assert_array_equal(both[0].values, both[1].values)
    with pytest.raises(UserError, match=r"column bytes of .* has the type binary; expected text or numbers"):
        read_table(tmp_path / "t.parquet")


def test_test_images_use_the_classes_of_the_training_images(tmp_path):
    file = written(tmp_path, "path,kind\na/1.png,cat\na/2.png,owl\nq.png,owl\n")
    assert targets(file, Named("q.png"), classes=["cat", "owl"]).values.tolist() == [1]
    with pytest.raises(UserError, match=r"classes that no training image has: owl; expected .* cat, dog"):
        targets(file, Named("q.png"), classes=["cat", "dog"])


GOOD = "a/1.png,1\na/2.png,2\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,kind\n" + GOOD, "has no column `path`, only file, kind"),
        ("path\na/1.png\n", "has 0 target columns and 1 rows"),
        ("path,kind\n", "has 1 target columns and 0 rows"),
        ("", "has no column `path`"),
        ("path,kind\n" + GOOD + "./a/1.png,1\n", r"lists 1 images more than once \(a/1.png\)"),
        ("path,kind\n" + GOOD + ",1\n", "has rows without a `path`"),
        ("path,kind\n" + GOOD + "b/3.png,1,7\n", "line 4 of .* has 3 cells; expected 2"),
        ("path,kind,kind\na/1.png,1,2\n", "two columns named 'kind'"),
        ("path,\n" + GOOD, "a column without a name"),
        ("path,kind\n" + GOOD + "b/3.png,\n", r"column kind of .* has no valid value for 1 images \(b/3.png\)"),
        ("path,x\na/1.png,1.5\na/2.png,nan\n", r"column x of .* has no valid value for 1 images \(a/2.png\)"),
        ("path,x\na/1.png,1.5\na/2.png,inf\n", r"has no valid value for 1 images \(a/2.png\)"),
        ("path,kind\na/1.png,cat\na/2.png,cat\n", r"are of one class \(cat\)"),
        ("path,x,y\na/1.png,1.5,1\na/2.png,1.5,2\n", "column x of .* has the same value for all 2 images"),
        (
            "path,kind\nx/1.png,1\nx/2.png,2\n",
            "none of the 2 paths .* the first path is x/1.png, the first image is a/1.p",
        ),
        ("path,k,j\na/1.png,cat,1\na/2.png,owl,2\n", r"the task is not clear .*\(texts: k; whole numbers: j\)"),
        ("path,k\na/1.png,\ud800\n".encode("utf-8", "surrogatepass"), r"line 2 of .* is not UTF-8: a/1\.png"),
    ],
)
def test_invalid_table_is_rejected(tmp_path, text, said):
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        targets(file)


def test_invalid_columns_tasks_and_files_are_rejected(tmp_path):
    file = written(tmp_path, "path,x,k\na/1.png,1.5,cat\na/2.png,2.5,owl\n")
    for wish, said in (
        ({"columns": ["y"]}, "has no column y; expected one of x, k"),
        ({"task": "ranking"}, "got task 'ranking'; expected one of classes, multilabel, regression"),
        ({"task": "classes"}, "has 2 target columns; expected one for classes: select it with --columns"),
        ({"columns": ["x"], "task": "multilabel"}, "column x of .* has fractions; expected 0 and 1"),
        ({"columns": ["k"], "task": "regression"}, "column k of .* has text; expected numbers"),
    ):
        with pytest.raises(UserError, match=said):
            targets(file, **wish)
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "no.csv")
    with pytest.raises(UserError, match=r"a .csv, .tsv or .parquet file"):
        read_table(tmp_path / "t.xlsx")
    with pytest.raises(UserError, match="cannot be read as a parquet file"):
        read_table(written(tmp_path, "no", "t.parquet"))


def test_rows_without_an_image_may_be_empty(tmp_path):
    file = written(tmp_path, "path,x\na/1.png,1.5\na/2.png,2.5\nelsewhere.png,\n")
    assert targets(file).values.tolist() == [[1.5], [2.5]]


def test_utf_16_tables_and_marked_paths_are_read(tmp_path):
    for name in ("a/=1.png", "b/2.png"):
        write(tmp_path / "data" / name)
    file = tmp_path / "t.csv"
    file.write_bytes("path,kind\r\na/=1.png,V\u00f6gel\r\nb/2.png,Vo\u0308gel2\r\n".encode("utf-16"))
    table = read_table(file)
    assert targets_of(table, open_source(tmp_path / "data"), meaning_of(table)).classes == ["V\u00f6gel", "V\u00f6gel2"]
    for name in ("=1.png", "2.png"):
        write(tmp_path / "flat" / name)
    file.write_text("path,kind\n'=1.png,cat\n2.png,dog\n")
    table = read_table(file)
    assert targets_of(table, open_source(tmp_path / "flat"), meaning_of(table)).unused == ()


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_of(noisy(8, 8), "PNG"))
