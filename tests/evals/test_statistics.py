"""Intervals against published worked examples, and every sentence a verdict can be."""

import numpy as np
import pytest

from unmask.evals.statistics import PRETRAINED, RANDOM_INIT, RAW_PIXELS, Answers, best_of, verdict
from unmask.metrics.intervals import paired_difference, wilson


def pair(both, first, second, neither):
    """Right and wrong of two feature sets with these counts."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_limits_are_those_published(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_wilson_limits_are_exact_at_the_ends_and_refuse_impossible_counts():
    assert wilson(0, 7).low == 0
    assert wilson(7, 7).high == 1
    for correct, total in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="between 0 and a positive total"):
            wilson(correct, total)


@pytest.mark.parametrize(
    ("counts", "value", "low", "high"),
    [
        # Fagerland, Lydersen, Laake 2014 (Bentur's airway data), Newcombe square-and-add: -0.507 to -0.026
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
        # Altman et al. 2000, "Statistics with confidence", p. 52
        ((14, 5, 0, 22), 0.122, 0.011, 0.226),
    ],
)
def test_paired_limits_are_those_published(counts, value, low, high):
    assert paired_difference(*pair(*counts)) == pytest.approx((value, low, high), abs=8e-4)


def test_a_paired_difference_turns_its_sign_when_the_two_change_places():
    first, second = pair(20, 12, 2, 16)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there == pytest.approx((-back.value, -back.high, -back.low))
    assert there.low < there.value < there.high


def test_answers_that_go_together_make_the_interval_narrower_and_none_makes_it_fail():
    together, apart = paired_difference(*pair(70, 10, 0, 20)), paired_difference(*pair(50, 30, 20, 0))
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low < 0.7 * (apart.high - apart.low)
    for counts in ((30, 0, 0, 0), (0, 0, 0, 30), (0, 30, 0, 0)):  # a margin of zero
        difference = paired_difference(*pair(*counts))
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
    with pytest.raises(ValueError, match="3 and 4 answers"):
        paired_difference(np.ones(3, bool), np.ones(4, bool))


def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        common = rng.random(200)
        first, second = common < 0.7, (common + 0.15 * rng.normal(size=200)) < 0.6
        low, high = paired_difference(first, second)[1:]
        covered += low <= 0.7 - 0.5998 <= high  # the mean of 0.6 - 0.15 z, cut to 0..1, over normal z
    assert 0.93 < covered / 2000 < 0.985


def answers(*rows, total=400):
    """(features, pool, share right, spread): the right ones are the first, so that sets overlap as far as they can."""
    return [Answers(features, pool, np.arange(total) < share * total) for features, pool, share in rows]


def test_the_better_pool_speaks_for_a_feature_set():
    found = answers((PRETRAINED, "cls", 0.5), (PRETRAINED, "mean", 0.7), (RANDOM_INIT, "cls", 0.6))
    assert best_of(found, PRETRAINED).pool == "mean"
    assert best_of(found, RAW_PIXELS) is None
    equal = answers((PRETRAINED, "cls", 0.5), (PRETRAINED, "mean", 0.5))
    assert best_of(equal, PRETRAINED).pool == "cls"
    assert found[0].correct == 200
    assert found[0].accuracy == 0.5


CLS, RANDOM, RAW = (PRETRAINED, "cls"), (RANDOM_INIT, "cls"), (RAW_PIXELS, "pixels")


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({CLS: 0.8}, "KNN_SCORE. Whether pre-training helped is not known from this: probe again with --controls."),
        ({CLS: 0.11}, "which cannot be told from chance. Whether pre-training helped is not known"),
        ({CLS: 0.11, RANDOM: 0.1, RAW: 0.12}, "No verdict: everything is near chance level."),
        ({CLS: 0.8, RANDOM: 0.5, RAW: 0.6}, "Pre-training helps. KNN_SCORE: 20.0 points more than raw pixels (60.0%)"),
        ({CLS: 0.8, RANDOM: 0.5}, "Better than the same encoder untrained. KNN_SCORE: 30.0 points more than the same"),
        ({CLS: 0.8, RANDOM: 0.9, RAW: 0.6}, "Pre-training does not help here."),
        ({CLS: 0.1, RANDOM: 0.9, RAW: 0.6}, "80.0 points fewer than the same encoder untrained (90.0%)"),
        ({CLS: 0.8, RANDOM: 0.8, RAW: 0.6}, "not shown to help: it beats one control, not both"),
        ({CLS: 0.8, RANDOM: 0.8, RAW: 0.8}, "not shown to help: the differences lie within the noise"),
        ({CLS: 0.8, RANDOM: 0.8, RAW: 0.8}, "no clear difference from raw pixels (80.0%): +0.0 points, 95% interval"),
    ],
)
def test_the_verdict_says_what_the_numbers_allow(shares, says):
    sentence = verdict(answers(*[(*key, share) for key, share in shares.items()]), kind="knn", chance=0.1)
    score = "kNN on the pre-trained features (class token) gets 80.0% of 400 test images right (95% interval 75.8 to 83.6%; chance 10.0%)"  # noqa: E501
    assert says.replace("KNN_SCORE", score) in sentence
    assert sentence.endswith(".")


def test_the_verdict_names_the_probe_and_needs_the_pre_trained_features():
    found = answers((*CLS, 0.8))
    assert verdict(found, kind="linear", chance=0.1).startswith("A linear probe on the pre-trained features")
    with pytest.raises(ValueError, match="no answers of the pre-trained features"):
        verdict(answers((*RAW, 0.8)), kind="knn", chance=0.1)


def test_few_test_images_give_no_verdict_where_many_do():
    few = answers((*CLS, 0.75), (*RANDOM, 0.5), (*RAW, 0.5), total=8)
    many = answers((*CLS, 0.75), (*RANDOM, 0.5), (*RAW, 0.5), total=800)
    assert "not shown" in verdict(few, kind="knn", chance=0.1)
    assert "Pre-training helps." in verdict(many, kind="knn", chance=0.1)
