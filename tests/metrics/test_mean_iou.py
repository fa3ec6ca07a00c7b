"""Mean IoU at the size of the files, without ignored pixels, compared with values computed by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from unmask.batch import IGNORED, Batch
from unmask.errors import UserError
from unmask.metrics import mean_iou
from unmask.metrics.mean_iou import Tally, classes_at, measure, score

NAMES = ("road", "sky", "tree", "never")
X = IGNORED
TRUTH = [[0, 0, 1, 1], [0, 2, 2, X]]
GUESS = [[0, 1, 1, 1], [0, 2, 3, 0]]


def tally(*pairs, classes=NAMES):
    made = Tally(classes)
    for guess, truth in pairs:
        made.add(torch.tensor(guess), torch.tensor(truth))
    return made


def test_mean_iou_matches_a_value_computed_by_hand():
    found = score(tally((GUESS, TRUTH)))
    np.testing.assert_allclose(found.ious, [2 / 3, 2 / 3, 1 / 2, np.nan])
    assert found.mean_iou == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert found.pixel_accuracy == pytest.approx(5 / 7)
    assert found.confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert found.confusion.dtype == np.int64
    assert found.interval == pytest.approx((found.mean_iou, found.mean_iou)), "resampling one image always draws it"
    assert found.as_measurement().by_class == {
        "road": pytest.approx(2 / 3), "sky": pytest.approx(2 / 3), "tree": 0.5, "never": None,
    }  # fmt: skip


def test_agrees_with_scikit_learn():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 4, (9, 6, 7))
    guess = np.where(draw.random(truth.shape) < 0.6, truth, draw.integers(0, 4, truth.shape))
    found = score(tally(*zip(guess, truth, strict=True)))
    np.testing.assert_allclose(found.ious, jaccard_score(truth.ravel(), guess.ravel(), average=None))
    assert found.pixel_accuracy == pytest.approx((truth == guess).mean())


def test_interval_matches_resampling_of_images():
    """Half of the images have only correct pixels, the others none: the number of correct images in a bootstrap sample
    is binomial.
    """
    right, wrong = ([[0, 1]], [[0, 1]]), ([[1, 0]], [[0, 1]])
    few, many = score(tally(*[right, wrong] * 10)), score(tally(*[right, wrong] * 200))
    assert few.mean_iou == many.mean_iou == pytest.approx(1 / 3)
    assert few.interval.low < many.interval.low < 1 / 3 < many.interval.high < few.interval.high
    share = np.quantile(np.random.default_rng(1).binomial(20, 0.5, 100_000) / 20, [0.025, 0.975])
    assert few.interval == pytest.approx(tuple(share / (2 - share)), abs=0.06)
    assert score(tally(*[right, wrong] * 10)).interval == few.interval, "the interval is reproducible"
    rare = score(tally(right, *[([[0]], [[0]])] * 5))
    assert 0 < rare.interval.low <= rare.interval.high == 1, "a class absent from a resample does not count"


def test_masks_with_ignored_pixels_only_are_rejected():
    with pytest.raises(UserError, match="got masks of 2 images in which all pixels are ignored"):
        score(tally(([[0]], [[X]]), ([[1]], [[X]])))


# Evaluation at the original size of the images


def test_scores_are_resized_instead_of_class_ids(monkeypatch):
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 1.0]]])  # two classes, 1 x 2
    assert classes_at(logits, (1, 2)).tolist() == [[0, 1]]
    assert classes_at(logits, (2, 8)).tolist() == [[0] * 5 + [1] * 3] * 2, "4 - 4 t = t at t = 0.8"
    many = torch.randn(23, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = classes_at(many, (40, 30))
    assert len(whole.unique()) > 10
    monkeypatch.setattr(mean_iou, "MOST_VALUES", 40 * 30 * 4)
    assert torch.equal(classes_at(many, (40, 30)), whole), "classes are resized in parts"


def test_every_image_is_evaluated_at_its_own_size():
    truths = {5: np.array([[0, 1]] * 3, np.uint8).repeat(4, 1), 2: np.array([[1, X], [1, 0]], np.uint8).repeat(5, 0)}
    seen = []

    def logits(images):
        """Predict class 0 in the left half of the image and class 1 in the right half."""
        seen.append(tuple(images.shape))
        left = torch.arange(images.shape[3]) < images.shape[3] // 2
        one = torch.stack([left, ~left]).float()[:, None].expand(-1, images.shape[2], -1)
        return one.expand(len(images), -1, -1, -1)

    index = torch.tensor([5, 2])
    batch = Batch(torch.zeros(2, 3, 4, 4), index, torch.zeros(2, dtype=torch.int64))
    found = measure(logits, [batch[:1], batch[1:]], truths.__getitem__, ("a", "b"))
    assert seen == [(1, 3, 4, 4)] * 2
    assert found.confusion.tolist() == [[12, 5], [10, 12]]
    assert found.num_images == 2
