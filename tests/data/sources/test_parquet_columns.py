"""Columns of parquet files: every type of bytes, class names in the metadata, and unusable label columns."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import file_of, noisy

from unmask.data.annotations.labels import require_labels
from unmask.data.sources.open_source import open_source
from unmask.errors import SourceError

FILES = [file_of(noisy(8, 8, seed=i), "PNG") for i in range(4)]
SAME_LENGTH = [data.ljust(max(map(len, FILES)), b"\0") for data in FILES]


def opened(tmp_path, columns, metadata=None):
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    return open_source(tmp_path / "d.parquet")


COLUMNS = {
    "binary": lambda: pa.array(FILES, pa.binary()),
    "large": lambda: pa.array(FILES, pa.large_binary()),
    "view": lambda: pa.array(FILES, pa.binary_view()),
    "dictionary": lambda: pa.array(FILES, pa.binary()).dictionary_encode(),
    "list": lambda: pa.array([list(data) for data in FILES], pa.list_(pa.uint8())),
    "large list": lambda: pa.array([list(data) for data in FILES], pa.large_list(pa.uint8())),
    "fixed": lambda: pa.array(SAME_LENGTH, pa.binary(len(SAME_LENGTH[0]))),
    "fixed list": lambda: pa.array(list(map(list, SAME_LENGTH)), pa.list_(pa.uint8(), len(SAME_LENGTH[0]))),
    "struct": lambda: pa.array([{"bytes": data, "path": None} for data in FILES]),
    "struct of large": lambda: pa.array(
        [{"bytes": data} for data in FILES], pa.struct([("bytes", pa.large_binary())])
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_bytes_are_read_from_every_column_type(tmp_path, kind):
    source = opened(tmp_path, {"image": COLUMNS[kind]()})
    assert [source.read(row) for row in (3, 0, 2, 1)] == [
        (SAME_LENGTH if "fixed" in kind else FILES)[row] for row in (3, 0, 2, 1)
    ]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.uint8()))), "image has list.* pixel values rather than"),
        (pa.array([[0.5], [1.0]]), "image has list.* pixel values"),
        (pa.array(["a.png", "b.png"]), "image has text, perhaps paths or base64"),
    ],
)
def test_unusable_image_columns_are_rejected_with_the_reason(tmp_path, column, said):
    with pytest.raises(SourceError, match=said):
        opened(tmp_path, {"image": column, "label": ["x", "y"]})


def test_class_names_are_read_from_the_metadata(tmp_path):
    names = {"names": ["zebra", "ant", "Vo\u0308gel", "unused"], "_type": "ClassLabel"}
    metadata = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    source = opened(tmp_path, {"image": FILES, "label": [2, 0, 1, 0]}, metadata)
    assert source.classes == ["zebra", "ant", "V\u00f6gel"], "the classes that occur, in the order of the metadata"
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 1, 0]
    unlabelled = opened(tmp_path, {"image": FILES, "label": [-1] * 4}, metadata)
    with pytest.raises(SourceError, match=r"has -1 \(no label\) in 4 of 4 rows"):
        require_labels(unlabelled)
    with pytest.raises(SourceError, match="has the label 7; expected 0 to 3, because its metadata name 4 classes"):
        opened(tmp_path, {"image": FILES, "label": [7, 0, 1, 0]}, metadata)
    for broken in ({}, [], {"info": {"features": {"label": {"names": 3}}}}, {"info": None}):
        assert opened(tmp_path, {"image": FILES, "label": [2, 0, 1, 0]}, broken).classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([[1, 2], [1], [2], [0]]), "several values per row"),
        (pa.array([0.5, 1.5, 2.0, 0.25]), r"fractions such as 0\.5, 1\.5, 0\.25, which are quantities"),
        (pa.array([{"a": 1}] * 4), "several values per row"),
        (pa.array([{"bytes": b"x"}] * 4), r"images \(perhaps masks\) rather than classes"),
        (pa.array([1, 2, 3, 4], pa.timestamp("s")), "which cannot be a class"),
    ],
)
def test_unusable_label_column_is_reported_where_labels_are_needed(tmp_path, column, said):
    source = opened(tmp_path, {"image": FILES, "label": column})
    assert source.labels is None
    assert source.classes == []
    assert source.read(0) == FILES[0], "pre-training needs no labels"
    with pytest.raises(SourceError, match=said):
        require_labels(source)


def test_numeric_labels_are_sorted_as_numbers_for_any_type(tmp_path):
    for column in ([10, 9, -1, 9], [10.0, 9.0, -1.0, 9.0], ["10", "9", "-1", "9"], [b"10", b"9", b"-1", b"9"]):
        source = opened(tmp_path, {"image": FILES, "label": column})
        assert source.classes == ["-1", "9", "10"]
        assert source.labels is not None
        assert source.labels.tolist() == [2, 1, 0, 1]
    spelled = opened(tmp_path, {"image": FILES, "label": pa.array(list("abab")).dictionary_encode()})
    assert spelled.classes == ["a", "b"]
