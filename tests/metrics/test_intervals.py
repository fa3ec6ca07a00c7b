"""Confidence intervals compared with published worked examples."""

import numpy as np
import pytest

from unmask.metrics.intervals import paired_difference, t_interval, wilson


def pair(both, first, second, neither):
    """Return two bool arrays, the images that two feature sets classify correctly, with these counts of agreement."""
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


def test_wilson_intervals_are_exact_at_0_and_1_and_impossible_counts_are_rejected():
    assert wilson(0, 7).low == 0
    assert wilson(7, 7).high == 1
    for correct, total in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="expected a count between 0 and a positive total"):
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


def test_a_paired_difference_changes_sign_when_first_and_second_are_exchanged():
    first, second = pair(20, 12, 2, 16)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there == pytest.approx((-back.value, -back.high, -back.low))
    assert there.low < there.value < there.high


def test_correlated_answers_narrow_the_interval():
    together, apart = paired_difference(*pair(70, 10, 0, 20)), paired_difference(*pair(50, 30, 20, 0))
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low < 0.7 * (apart.high - apart.low)
    for counts in ((30, 0, 0, 0), (0, 0, 0, 30), (0, 30, 0, 0)):  # all answers of one feature set are equal
        difference = paired_difference(*pair(*counts))
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
    with pytest.raises(ValueError, match="3 and 4 answers"):
        paired_difference(np.ones(3, bool), np.ones(4, bool))


def test_intervals_cover_the_true_difference_in_95_percent_of_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        common = rng.random(200)
        first, second = common < 0.7, (common + 0.15 * rng.normal(size=200)) < 0.6
        low, high = paired_difference(first, second)[1:]
        covered += low <= 0.7 - 0.5998 <= high  # 0.5998: mean of 0.6 - 0.15 z, clipped to 0..1, for normal z
    assert 0.92 < covered / 400 < 0.99


def test_t_intervals_are_those_of_a_textbook():
    low, high = t_interval([0.5, 0.6, 0.7])  # s = 0.1, t_2 = 4.3027
    assert low == pytest.approx(0.6 - 4.3027 * 0.1 / 3**0.5, abs=1e-5)
    assert high == pytest.approx(0.6 + 4.3027 * 0.1 / 3**0.5, abs=1e-5)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
