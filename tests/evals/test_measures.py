"""Average precision and R2: agreement with scikit-learn, and bootstrap intervals."""

import numpy as np
import pytest
from feature_tables import result_of
from scipy.stats import bootstrap
from sklearn.metrics import average_precision_score, r2_score

from unmask.evals import measures
from unmask.evals.measures import average_precision, by_column, r_squared, resampled
from unmask.evals.scores import Scored
from unmask.results import MEAN_AP, PRETRAINED, RAW_PIXELS, FeatureScore


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_scikit_learn_with_and_without_weights(ties):
    rng = np.random.default_rng(0)
    truth = (rng.random(200) < 0.3).astype(float)
    scores = rng.normal(size=200) + truth
    scores = scores.round() if ties else scores
    weights = rng.integers(0, 4, (5, 200)).astype(float)
    want = [average_precision_score(truth, scores, sample_weight=each) for each in weights]
    np.testing.assert_allclose(average_precision(truth, scores, weights), want, rtol=1e-12)
    assert np.isnan(average_precision(np.zeros(200), scores, weights)).all()


def test_r_squared_equals_scikit_learn_even_for_targets_far_from_zero():
    rng = np.random.default_rng(0)
    truth = 1e6 + rng.normal(size=300)
    guess = truth + 0.5 * rng.normal(size=300)
    weights = rng.integers(0, 4, (5, 300)).astype(float)
    want = [r2_score(truth, guess, sample_weight=each) for each in weights]
    np.testing.assert_allclose(r_squared(truth, guess, weights), want, atol=1e-6)
    one = np.zeros((1, 300))
    one[0, 7] = 300
    assert np.isnan(r_squared(truth, guess, one)).all(), (
        "R2 is undefined for repeats of one image, which have no variance"
    )


def test_resampled_values_are_reproducible_and_centred_on_the_value_for_all_images():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(400, 2))
    guess = truth + 0.7 * rng.normal(size=truth.shape)
    draws = resampled(r_squared, truth, guess)
    assert len(draws) == measures.RESAMPLES
    np.testing.assert_array_equal(draws, resampled(r_squared, truth, guess))
    value = by_column(r_squared, truth, guess).mean()
    assert draws.mean() == pytest.approx(value, abs=0.01)
    assert np.ptp(resampled(r_squared, truth, truth)) == 0
    again = [resampled_once(np.random.default_rng(n)) for n in range(300)]
    assert draws.std() == pytest.approx(np.std(again), rel=0.2), "the spread equals that over newly sampled test sets"


def resampled_once(rng):
    truth = rng.normal(size=(400, 2))
    return by_column(r_squared, truth, truth + 0.7 * rng.normal(size=truth.shape)).mean()


def test_a_resample_leaves_out_columns_without_positives():
    truth = np.zeros((30, 2))
    truth[0, 0] = 1
    truth[::2, 1] = 1
    draws = resampled(average_precision, truth, truth + 0.0)
    assert np.all(draws == 1.0)
    alone = resampled(average_precision, truth[:, :1], truth[:, :1])
    assert 0.25 < np.isnan(alone).mean() < 0.45, "(1 - 1/30)^30"


def test_two_feature_sets_are_compared_resample_by_resample():
    rng = np.random.default_rng(0)
    truth = (rng.random((300, 3)) < 0.3).astype(float)
    noise = rng.normal(size=truth.shape)

    def sampled(features, strength):
        guess = strength * truth + noise  # both predictions have this noise, which nearly cancels in the difference
        value = by_column(average_precision, truth, guess).mean()
        resamples = resampled(average_precision, truth, guess)
        low, high = np.percentile(resamples, [2.5, 97.5])
        row = FeatureScore(features=features, pool="mean", value=value, low=low, high=high, total=300)
        return Scored(row, resamples=resamples)

    result = result_of([sampled(RAW_PIXELS, 1.2), sampled(PRETRAINED, 1.3)], kind="linear", chance=0.3, metric=MEAN_AP)
    worse, better = result.rows
    assert better.low < worse.value < better.value
    (gap,) = result.differences
    assert 0 < gap.low < gap.value < gap.high
    said = result.verdict
    assert said.startswith("Better than raw pixels. A linear probe on the pre-trained features (mean over patches) ")
    assert f"reaches a mean average precision of {better.value:.3f} on 300 test images" in said
    assert f"{gap.value:.3f} more than raw pixels ({worse.value:.3f}), 95% interval {gap.low:+.3f}" in said


def test_bootstrap_values_equal_those_of_scipy():
    rng = np.random.default_rng(0)
    truth = (rng.random((60, 2)) < 0.4).astype(float)
    guess = truth + rng.normal(size=truth.shape)

    def mean_precision(rows):
        return np.mean([average_precision_score(truth[rows, t], guess[rows, t]) for t in range(2)])

    want = bootstrap(
        (np.arange(60),), mean_precision, n_resamples=50, method="percentile", vectorized=False,
        rng=np.random.default_rng(measures.SEED),
    )  # fmt: skip
    np.testing.assert_allclose(resampled(average_precision, truth, guess)[:50], want.bootstrap_distribution, rtol=1e-12)
