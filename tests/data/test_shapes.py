"""The embedded set `shapes`: images depend only on their index, and raw pixels predict the class poorly."""

import hashlib

import numpy as np

from unmask.data.sources import shapes
from unmask.data.sources.open_source import open_source
from unmask.evals.probes.knn import knn


def test_an_image_depends_on_its_index_alone():
    index = np.array([5, 3, 19_999, 3])
    images, labels = shapes.draw(index)
    assert images.shape == (4, shapes.SIZE, shapes.SIZE, 3)
    assert images.dtype == np.uint8
    for row, i in enumerate(index):
        alone, label = shapes.draw(np.array([i]))
        assert np.array_equal(alone[0], images[row])
        assert label[0] == labels[row]
    assert not np.array_equal(images[0], images[1])


def test_shapes_do_not_depend_on_the_chunk_size(monkeypatch):
    whole, labels = shapes.draw(np.arange(50))
    monkeypatch.setattr(shapes, "CHUNK", 7)
    pieces, same = shapes.draw(np.arange(50))
    assert np.array_equal(whole, pieces)
    assert np.array_equal(labels, same)
    assert shapes.draw(np.arange(0))[0].shape == (0, shapes.SIZE, shapes.SIZE, 3)


def test_shapes_have_not_changed():
    """All published results on `shapes` depend on the bytes of these images."""
    images, labels = shapes.draw(np.arange(64))
    assert labels[:12].tolist() == [2, 3, 1, 1, 5, 0, 1, 0, 1, 0, 0, 0]
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith("cddfe2a3a8024ad3")


def test_classes_are_balanced_and_objects_are_visible():
    images, labels = shapes.draw(np.arange(3000))
    counts = np.bincount(labels, minlength=len(shapes.CLASSES))
    assert counts.min() > 0.8 * counts.max()
    spread = images.astype(float).std(axis=(1, 2)).max(1)
    assert spread.min() > 5, "an image without a visible object"


def test_raw_pixels_predict_the_class_poorly():
    images, labels = shapes.draw(np.arange(2500))
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat -= flat[:2000].mean(0)
    accuracy = (knn(flat[:2000], labels[:2000], flat[2000:]) == labels[2000:]).mean()
    assert accuracy < 0.32, "chance is 1 in 6"


def test_training_and_test_images_differ():
    train, test = open_source("shapes:100"), open_source("shapes-test:100")
    assert train.classes == test.classes == list(shapes.CLASSES)
    assert not {train.read(i) for i in range(100)} & {test.read(i) for i in range(100)}
    assert train.names[0] == "shapes-000000"
    assert test.names[0] == f"shapes-{shapes.TRAIN:06d}"
