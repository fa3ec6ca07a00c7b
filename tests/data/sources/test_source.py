"""Sources are changed by copying: what one command decides about a source must not reach other users of it."""

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_images
from corpus import file_of, noisy, npy

from unmask.batch import ImageSpec
from unmask.data.annotations.labels import renumber_labels, require_labels
from unmask.data.augment import CropConfig
from unmask.data.decode.reading import Reading
from unmask.data.image_reader import ImageReader
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.tiff_samples import apply_reading


def test_reading_and_digests_are_set_on_a_copy(tmp_path):
    (tmp_path / "a.png").write_bytes(file_of(noisy(4, 4), "PNG"))
    source, reading = open_source(tmp_path), Reading(alpha="band")
    changed = source.with_reading(reading).with_digests(np.ones(1, np.uint64))
    assert (source.reading, source.digests) == (Reading(), None)
    assert (changed.reading, changed.digests.tolist()) == (reading, [1])
    assert (changed.names, changed.read(0)) == (source.names, source.read(0))
    assert apply_reading(source, reading).reading == reading
    assert source.reading == Reading()


def test_scan_leaves_its_source_unchanged(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.npy").write_bytes(npy(noisy(30, 40 + number, 40 + number)))
    source = open_source(tmp_path)
    found = scan(source, workers=0)
    assert found.reading.axes == "CHW"
    assert (source.reading.axes, source.digests) == ("auto", None)
    assert (found.applied_to(source).reading, found.applied_to(source).digests[0]) == (found.reading, found.digests[0])


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet", "joined"])
def test_every_kind_of_source_can_be_read_after_a_copy(kind, tmp_path):
    source = source_of(kind, tmp_path)
    wanted = [source.read(row) for row in range(len(source))]
    copied = source.with_reading(Reading(alpha="band"))
    assert type(copied) is type(source)
    assert [copied.read(row) for row in range(len(copied))] == wanted
    assert [source.read(row) for row in range(len(source))] == wanted


def test_labels_are_renumbered_on_a_copy(tmp_path):
    test = require_labels(open_source(write_images(tmp_path / "test", 4, classes=2)))
    known = ["another", *test.classes]
    renumbered = renumber_labels(test, known, "the run")
    assert (renumbered.classes, renumbered.labels.tolist()) == (known, [1, 1, 2, 2])
    assert (test.classes, test.labels.tolist()) == (known[1:], [0, 0, 1, 1])


def test_require_labels_does_not_change_the_labels_of_its_source(tmp_path):
    write_images(tmp_path / "b", 2)
    source = open_source(tmp_path)
    assert source.labels is None
    assert require_labels(source, ["a", "b"]).classes == ["b"]
    assert source.labels is None


def test_annotations_are_set_on_a_copy_of_the_reader(tmp_path):
    source = open_source(write_images(tmp_path / "images", 2))
    spec = ImageSpec(channels=3, size=(8, 8), dtype="uint8", mean=(0.0,) * 3, std=(1.0,) * 3)
    images = ImageReader(source, np.arange(2), spec, CropConfig())
    images.keep_decoded()
    with_zeros = images.with_annotations(Zeros())
    assert images.annotations is None
    assert with_zeros.kept is images.kept
    with pytest.raises(AssertionError, match="rows without annotations"):
        ImageReader(source, np.arange(3), spec, CropConfig()).with_annotations(Zeros())


def source_of(kind, folder):
    images = [file_of(noisy(4, 4, seed=seed), "PNG") for seed in range(4)]
    names = [f"{part}/{number}.png" for part in "ab" for number in range(2)]
    if kind == "parquet":
        pq.write_table(pa.table({"image": images}), folder / "d.parquet")
        return open_source(folder / "d.parquet")
    if kind == "zip":
        with zipfile.ZipFile(folder / "d.zip", "w") as archive:
            for name, data in zip(names, images, strict=True):
                archive.writestr(name, data)
        return open_source(folder / "d.zip")
    for name, data in zip(names, images, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return open_source((str(folder / "a"), str(folder / "b"))) if kind == "joined" else open_source(folder)


class Zeros:
    """Annotations of the rows 0 and 1."""

    rows = np.arange(2)

    def cut(self, row, size, box, target, flip):
        return {"maps": np.zeros(target, np.uint8)}
