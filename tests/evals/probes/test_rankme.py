"""The effective rank of features with known singular values, and of unlabelled images by `unmask probe`."""

import html
import json
import re
from contextlib import suppress

import numpy as np
import pytest
from conftest import SMALL_RUN, pretrain, write_images

from unmask import commands
from unmask.errors import UserError
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.probes.rankme import PROBE, effective_rank
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, UNLABELLED, FeatureScore, read_results
from unmask.run import Run


def features_with(singular, rows=50):
    """Return features (rows, D) with these D singular values."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(rows, len(singular))))[0]
    right = np.linalg.qr(rng.normal(size=(len(singular), len(singular))))[0]
    return left @ np.diag(singular) @ right


def test_the_effective_rank_of_features_with_known_singular_values():
    assert effective_rank(features_with([3.0] * 8)) == pytest.approx(8, abs=1e-3), "all directions alike"
    assert effective_rank(features_with([3.0] * 5 + [0.0] * 3)) == pytest.approx(5, abs=1e-3)
    assert effective_rank(np.outer(np.arange(1, 9), np.ones(4))) == pytest.approx(1, abs=1e-4), "one direction"
    assert effective_rank(np.zeros((5, 4))) == 1
    share = np.array([0.5, 0.25, 0.25])
    assert effective_rank(features_with(4 * share)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-4)


def test_the_effective_rank_is_independent_of_scale_and_image_order():
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.logspace(0, 2, 6)
    assert effective_rank(1000 * x) == pytest.approx(effective_rank(x))
    assert effective_rank(x[::-1]) == pytest.approx(effective_rank(x))
    assert 1 < effective_rank(x.astype(np.float32)) < 6


def test_unlabelled_images_are_measured_with_both_controls_and_shown_in_the_report(tmp_path, monkeypatch, capsys):
    images = write_images(tmp_path / "images", 16)
    run = Run(tmp_path / "run")
    pretrain(images, recipe="mae_nano", out=run.path, settings=[*SMALL_RUN, "train.steps=2", "train.picture_every=9"])
    arguments = ["probe", str(run.path), str(images), "--kind", "rankme", "--device", "cpu", "--json"]
    monkeypatch.setattr("sys.argv", ["unmask", *arguments])
    with suppress(SystemExit):
        commands.main()
    out, err = capsys.readouterr()
    (result,) = read_results(run).probes
    assert (result.kind, result.task, result.metric, result.chance) == ("rankme", UNLABELLED, "effective rank", None)
    assert (result.train_images, result.test_images) == (0, 16)
    assert result.test.images == result.data
    assert [(row.features, row.pool) for row in result.rows] == [
        (RAW_PIXELS, "pixels"), (RANDOM_INIT, "cls"), (RANDOM_INIT, "mean"), (PRETRAINED, "cls"), (PRETRAINED, "mean"),
    ]  # fmt: skip
    assert all(1 <= row.value <= 16 for row in result.rows)
    assert [row["value"] for row in json.loads(out)["rows"]] == [row.value for row in result.rows]
    assert f"pre-trained  mean      {result.rows[-1].value:6.3g}" in err
    page = html.unescape((run.path / "report.html").read_text())
    assert f"Effective rank (RankMe) on {images}<" in page
    assert f"<td>{result.rows[-1].value:.3g}</td>" in page, "the report rounds as the console does"
    assert result.verdict in page


def test_options_about_labels_are_rejected_for_rankme():
    for options in ({"shots": 5}, {"test": "other"}, {"targets": "t.csv"}):
        with pytest.raises(UserError, match="but --kind rankme uses no labels; leave it out"):
            ProbeOptions(data="images", **options).check_label_free("rankme")
    with pytest.raises(UserError, match="got --layer best, which needs labels"):
        ProbeOptions(data="images", layer="best").check_label_free("rankme")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "got --seed 3, but --kind rankme draws nothing at random; leave it out"),
        ({"controls": True}, "got --controls, but --kind rankme always measures the controls; leave it out"),
        ({"mask_votes": 5}, "got --mask-votes 5, but --kind rankme has no votes; use 0 for whole images or 1 mask"),
    ],
)
def test_options_that_rankme_would_ignore_are_rejected(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ProbeOptions(data="images", **options).check_label_free("rankme")
    ProbeOptions(data="images", mask_votes=1).check_label_free("rankme")


def test_the_verdict_names_every_feature_set():
    rows = [
        FeatureScore(features=name, pool=pool, value=value)
        for name, pool, value in ((RAW_PIXELS, "pixels", 20.0), (PRETRAINED, "cls", 9.87), (PRETRAINED, "mean", 31.44))
    ]
    assert PROBE.verdict(rows, 64).startswith(
        "The effective rank of the pre-trained features is 9.87 (class token) and 31.4 (mean over patches), of at most "
        "64; raw pixels: 20 (pixels). Compare it between runs of one method"
    )
