"""The label-budget curve: means and intervals over draws, and differences draw by draw."""

import numpy as np
import pytest

from unmask.evals.label_budget import Draw, curve_differences, curve_rows
from unmask.evals.predictions import Prediction
from unmask.evals.probe_text import curve_verdict
from unmask.metrics.intervals import t_interval
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, CurveResult, ImageSet, TestIdentity

TEST_Y = np.arange(100) % 2


def prediction(features, right, pool="mean"):
    """Return predictions of which the first `right` are correct."""
    return Prediction(features, pool, np.where(np.arange(100) < right, TEST_Y, 1 - TEST_Y), {"c": 0.1})


def curve(scores):
    """scores: numbers of correct predictions (pre-trained, random init, raw pixels), by number of labels and draw."""
    drawn = [
        Draw(
            shots,
            np.arange(2 * shots) % 2,
            [prediction(RAW_PIXELS, pixels, "pixels"), prediction(RANDOM_INIT, untrained), prediction(PRETRAINED, own)],
        )
        for shots, draws in scores.items()
        for own, untrained, pixels in draws
    ]
    rows = curve_rows(drawn, TEST_Y)
    return CurveResult(
        kind="linear",
        data=ImageSet(name="data"),
        test=TestIdentity(held_out=0.2),
        shots=tuple(sorted(scores)),
        draws=len(drawn) // len(scores),
        rows=rows,
        differences=curve_differences(rows, ()),
    )


def test_a_point_records_every_draw_with_the_mean_and_its_interval():
    found = curve({1: [(50, 40, 40), (60, 50, 50), (70, 60, 60)], 10: [(90, 95, 80), (80, 85, 70), (85, 75, 75)]})
    assert [point.shots for point in found.rows[0].points] == [1, 10]
    point = found.rows[2].points[0]
    assert found.rows[2].features == PRETRAINED
    assert point.correct == (50, 60, 70)
    assert point.mean == pytest.approx(0.6)
    assert (point.low, point.high) == pytest.approx(t_interval([0.5, 0.6, 0.7]))
    assert point.fits == ({"c": 0.1},) * 3


def test_differences_are_paired_by_draw():
    found = curve({1: [(50, 40, 40), (60, 50, 51), (70, 60, 60)], 10: [(90, 95, 80), (80, 85, 70), (85, 75, 75)]})
    point = found.rows[2].points[0]
    assert point.low < 0.5 < point.high, "unpaired, the variation between draws would exceed the difference"
    verdict = curve_verdict(found)
    assert verdict.startswith("Pre-training helps with 1 labels per class, where it is better than raw pixels and ")
    assert "Points above raw pixels: +9.7 (" in verdict
    assert "Points above the same encoder untrained: +10.0 (+10.0 to +10.0) with 1, +0.0 (" in verdict
    none = curve({1: [(50, 60, 40), (60, 40, 50)], 2: [(50, 60, 40), (60, 40, 50)]})
    assert curve_verdict(none).startswith("Pre-training is not shown to help at any of these budgets")


def test_intervals_stay_between_0_and_1():
    point = curve({1: [(100, 1, 1), (90, 1, 1)], 2: [(100, 0, 0), (100, 0, 0)]}).rows[2].points
    assert point[0].high == 1.0
    assert (point[1].low, point[1].high) == (1.0, 1.0)
