"""Which sentences the verdict of a probe contains."""

import numpy as np
import pytest
from feature_tables import result_of

from unmask.evals.labelled_images import Labelling
from unmask.evals.predictions import Prediction
from unmask.evals.scores import score
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS


def result(*rows, total=400, kind="knn"):
    """Return the result for rows of (features, pool, accuracy); the first images are the correct ones in each."""
    truth = np.zeros(total, np.int64)
    predictions = [Prediction(features, pool, np.arange(total) >= share * total) for features, pool, share in rows]
    return result_of([score(each, truth, Labelling("classes", ("a", "b"))) for each in predictions], kind=kind)


def test_the_better_pooling_represents_a_feature_set():
    found = result((PRETRAINED, "cls", 0.5), (PRETRAINED, "mean", 0.7), (RANDOM_INIT, "cls", 0.6))
    assert found.row(PRETRAINED).pool == "mean"
    assert found.row(RAW_PIXELS) is None
    (difference,) = found.differences
    assert (difference.features, difference.pool, difference.own_pool) == (RANDOM_INIT, "cls", "mean")
    assert difference.value == pytest.approx(0.1)
    equal = result((PRETRAINED, "cls", 0.5), (PRETRAINED, "mean", 0.5))
    assert equal.row(PRETRAINED).pool == "cls"
    assert (found.rows[0].correct, found.rows[0].value) == (200, 0.5)


CLS, RANDOM, RAW = (PRETRAINED, "cls"), (RANDOM_INIT, "cls"), (RAW_PIXELS, "pixels")


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({CLS: 0.8}, "KNN_SCORE. Probe again with --controls to find out whether pre-training helped."),
        ({CLS: 0.11}, "which is indistinguishable from chance. Probe again with --controls"),
        ({CLS: 0.11, RANDOM: 0.1, RAW: 0.12}, "No verdict: all scores are near chance level."),
        ({CLS: 0.8, RANDOM: 0.5, RAW: 0.6}, "Pre-training helps. KNN_SCORE: 20.0 points more than raw pixels (60.0%)"),
        ({CLS: 0.8, RANDOM: 0.5}, "Better than the same encoder untrained. KNN_SCORE: 30.0 points more than the same"),
        ({CLS: 0.8, RANDOM: 0.9, RAW: 0.6}, "Pre-training does not help here."),
        ({CLS: 0.1, RANDOM: 0.9, RAW: 0.6}, "80.0 points fewer than the same encoder untrained (90.0%)"),
        ({CLS: 0.8, RANDOM: 0.8, RAW: 0.6}, "not shown to help: it beats one control, not both"),
        ({CLS: 0.8, RANDOM: 0.8, RAW: 0.8}, "not shown to help: the differences are within the noise"),
        ({CLS: 0.8, RANDOM: 0.8, RAW: 0.8}, "no clear difference from raw pixels (80.0%): +0.0 points, 95% interval"),
    ],
)
def test_the_verdict_claims_only_what_the_intervals_support(shares, says):
    sentence = result(*[(*key, share) for key, share in shares.items()]).verdict
    score = "kNN on the pre-trained features (class token) gets 80.0% of 400 test images right (95% interval 75.8 to 83.6%; chance 10.0%)"  # noqa: E501
    assert says.replace("KNN_SCORE", score) in sentence
    assert sentence.endswith(".")


def test_the_verdict_names_the_probe_and_needs_the_pre_trained_features():
    assert result((*CLS, 0.8), kind="linear").verdict.startswith("A linear probe on the pre-trained features")
    with pytest.raises(ValueError, match="no score of the pre-trained features"):
        result((*RAW, 0.8))


def test_there_is_no_verdict_with_few_test_images():
    few = result((*CLS, 0.75), (*RANDOM, 0.5), (*RAW, 0.5), total=8)
    many = result((*CLS, 0.75), (*RANDOM, 0.5), (*RAW, 0.5), total=800)
    assert "not shown" in few.verdict
    assert "Pre-training helps." in many.verdict
