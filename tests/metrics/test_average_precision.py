"""Test COCO's average precision against values computed by hand, and that pycocotools prints nothing."""

import sys

import numpy as np
import pytest

from unmask.errors import UserError
from unmask.metrics.average_precision import ImageBoxes, average_precision

NAMES = ("ant", "bee", "cat")


def boxes(*rows, **more):
    """Each row is (x1, y1, x2, y2, label[, score])."""
    table = np.array(rows, np.float64).reshape(len(rows), -1 if rows else 5)
    scores = table[:, 5] if table.shape[1] > 5 else None
    return ImageBoxes(table[:, :4], table[:, 4].astype(np.int64), scores, **more)


@pytest.fixture(autouse=True)
def _needs_pycocotools(request):
    if "without" not in request.node.name:
        pytest.importorskip("pycocotools")


def test_perfect_detections_score_one_and_classes_without_boxes_are_skipped(capfd):
    truth = [boxes((0, 0, 10, 10, 0), (5, 5, 30, 20, 1)), boxes()]
    found = [boxes((0, 0, 10, 10, 0, 0.9), (5, 5, 30, 20, 1, 0.8)), boxes()]
    got = average_precision(truth, found, NAMES)
    assert (got.ap, got.ap50, got.ap75) == pytest.approx((1, 1, 1))
    assert got.classes == {"ant": pytest.approx(1), "bee": pytest.approx(1), "cat": None}
    out, err = capfd.readouterr()
    assert out == err == ""


def test_average_precision_matches_a_value_computed_by_hand():
    """Class 0 has two true boxes and three detections: a match, a false positive, and a match with an IoU of 0.6.

    At an IoU of 0.5 the precision is 1 up to a recall of 1/2, and 2/3 above it: 51 of 101 points are 1, and 50 are 2/3.
    At an IoU of 0.75 the last detection is no match: 51 points are 1, the others 0. Class 1 has one box, which is not
    detected.
    """
    truth = [boxes((0, 0, 10, 10, 0), (50, 50, 60, 60, 0)), boxes((0, 0, 10, 10, 1))]
    found = [boxes((0, 0, 10, 10, 0, 0.9), (50, 50, 60, 56, 0, 0.5)), boxes((0, 0, 10, 10, 0, 0.7))]
    got = average_precision(truth, found, NAMES)
    at50, at75 = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert got.classes == {"ant": pytest.approx(at50), "bee": pytest.approx(0), "cat": None}
    assert got.ap50 == pytest.approx(at50 / 2)
    assert got.ap75 == pytest.approx(at75 / 2)
    assert got.ap == pytest.approx((3 * at50 + 7 * at75) / 10 / 2), "the last detection matches at 0.50, 0.55 and 0.60"


def test_duplicate_detections_count_once():
    truth = [boxes((0, 0, 10, 10, 0), (50, 50, 60, 60, 0))]
    found = [boxes((0, 0, 10, 10, 0, 0.9), (0, 0, 10, 9.9, 0, 0.8), (50, 50, 60, 60, 0, 0.7))]
    assert average_precision(truth, found, NAMES).ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_crowd_boxes_do_not_change_average_precision():
    truth = [boxes((0, 0, 10, 10, 0), (20, 20, 60, 60, 0), crowd=np.array([False, True]))]
    found = [boxes((25, 25, 35, 35, 0, 0.9), (0, 0, 10, 10, 0, 0.8))]
    assert average_precision(truth, found, NAMES).ap50 == pytest.approx(1)
    missed = [boxes((0, 0, 10, 10, 0, 0.8))]
    assert average_precision(truth, missed, NAMES).ap50 == pytest.approx(1)
    plain = [truth[0]._replace(crowd=None)]
    assert average_precision(plain, missed, NAMES).ap50 == pytest.approx(51 / 101)


def test_no_detections_score_zero():
    got = average_precision([boxes((0, 0, 10, 10, 0))], [boxes()], NAMES)
    assert (got.ap, got.ap50, got.classes["ant"]) == (0, 0, 0)


def test_missing_boxes_and_unequal_lengths_are_rejected():
    with pytest.raises(UserError, match="got 1 test images without any true box"):
        average_precision([boxes()], [boxes((0, 0, 10, 10, 0, 0.9))], NAMES)
    with pytest.raises(ValueError, match="got predictions for 2 images and true boxes for 1"):
        average_precision([boxes()], [boxes(), boxes()], NAMES)


def test_missing_pycocotools_is_reported(monkeypatch):
    for name in ("pycocotools", "pycocotools.coco", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pycocotools, which is not installed: pip install pycocotools"):
        average_precision([boxes((0, 0, 10, 10, 0))], [boxes()], NAMES)
