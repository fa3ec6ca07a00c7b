"""Result records round-trip, are identified by the content of files, and are converted from earlier versions."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unmask.errors import UserError
from unmask.results import (
    MULTILABEL,
    PRETRAINED,
    R2,
    RANDOM_INIT,
    RAW_PIXELS,
    REGRESSION,
    BaselineLosses,
    CurvePoint,
    CurveResult,
    CurveRow,
    Difference,
    FeatureScore,
    FinetuneResult,
    ImageSet,
    LayerChoice,
    OtherRun,
    ProbeResult,
    TargetScore,
    TargetTable,
    TestIdentity,
    TestOnTheWay,
    from_json,
    read_results,
    read_score,
    to_json,
)
from unmask.run import Run

EARLIER = json.loads((Path(__file__).parent / "earlier_results.json").read_text())  # written by version 0.1
BIRDS = ImageSet(name="birds", path="/data/birds", digest="aa")
HELD_OUT = TestIdentity(held_out=0.2, seed=0)
PROBE = ProbeResult(
    kind="linear",
    data=BIRDS,
    test=HELD_OUT,
    step=40,
    names=("a", "b"),
    train_images=160,
    test_images=40,
    chance=0.5,
    differences=(
        Difference(features=RAW_PIXELS, pool="pixels", own_pool="mean", value=0.2, low=0.1, high=0.3),
    ),
    caveats=("one",),
    targets=TargetTable(path="t.csv", columns=("x", "y")),
    against=(OtherRun(name="b", run="runs/b", step=3),),
    rows=(
        FeatureScore(features=RAW_PIXELS, pool="pixels", value=0.6, low=0.5, high=0.7, total=40, correct=24),
        FeatureScore(
            features=PRETRAINED,
            pool="mean",
            value=0.8,
            low=0.7,
            high=0.9,
            total=40,
            correct=32,
            targets=(TargetScore(name="x", value=None, positives=0),),
            fit={"c": 0.1},
            converged=False,
            layer=LayerChoice(3, 12, "asked for"),
            votes=2,
        ),
        FeatureScore(features=PRETRAINED, pool="cls", value=0.7),
    ),
    best=TestOnTheWay(step=3, value=0.9),
)  # fmt: skip
CURVE = CurveResult(
    kind="knn",
    data=BIRDS,
    test=TestIdentity(images=ImageSet(name="birds-test")),
    shots=(1, 5),
    draws=2,
    rows=(
        CurveRow(
            features=PRETRAINED,
            pool="mean",
            points=(CurvePoint(shots=1, mean=0.5, low=0.1, high=0.9, values=(0.4, 0.6), correct=(4, 6)),),
        ),
    ),
)
SCORE = FinetuneResult(
    task="segment",
    metric="mean_iou",
    numbers={"mean_iou": 0.5, "pixel_accuracy": 0.8},
    data=BIRDS,
    test=HELD_OUT,
    step=10,
    by_class={"a": 0.5, "b": None},
    confusion=((1, 2), (3, 4)),
    best=TestOnTheWay(step=5, value=0.6),
)
BASELINES = BaselineLosses(images=8, guesses={"mean": 1.0}, losses=((0, 2.0), (4, 1.5)))


def make_run(path: Path) -> Run:
    run = Run.create(path)
    run.write("config.json", {"recipe": "mae_nano", "method": {"name": "mae"}, "data": {"source": "birds"}})
    run.write("plan.json", {"steps": 10})
    return run


def test_every_record_round_trips_under_any_file_name(tmp_path):
    run = make_run(tmp_path / "run")
    for name, record in zip("wxyz", (SCORE, PROBE, BASELINES, CURVE), strict=True):
        run.write(f"evals/{name}.json", to_json(record))
    results = read_results(run)
    assert results.probes == (PROBE,)
    assert results.curves == (CURVE,)
    assert results.finetuned == SCORE
    assert results.baselines == BASELINES
    assert results.records["x"] is results.probes[0]
    assert results.damaged == ()


def test_damaged_and_unknown_files_are_reported_and_others_are_read(tmp_path):
    run = make_run(tmp_path / "run")
    run.write("evals/good.json", to_json(PROBE))
    run.write("evals/changed.json", to_json(PROBE))
    (run.evals / "changed.json").write_text((run.evals / "changed.json").read_text().replace("0.8", "0.9"))
    run.write("evals/newer.json", {"record": "hologram"})
    run.write("evals/wrong.json", to_json(PROBE) | {"rows": 3})
    run.write("evals/other.json", {"hello": "world"})
    results = read_results(run)
    assert list(results.records) == ["good"]
    changed, newer, other, wrong = results.damaged
    assert "changed.json has changed since it was written" in changed
    assert "newer.json: got a result of record 'hologram'; expected probe, curve" in newer
    assert "other.json: got a result without data, test, kind, shots, rows" in other
    assert "wrong.json: got a probe result with an invalid rows" in wrong


def test_score_must_be_of_the_last_step(tmp_path):
    run = make_run(tmp_path / "run")
    assert read_score(run) is None
    run.write("evals/fine-tuned.json", to_json(replace(SCORE, step=9)))
    assert read_score(run) is None
    run.write("evals/fine-tuned.json", to_json(SCORE))
    assert read_score(run) == SCORE
    assert SCORE.value == 0.5


def test_probes_of_earlier_versions_are_converted():
    probe = from_json(EARLIER["probe-linear-img"])
    assert isinstance(probe, ProbeResult)
    assert (probe.kind, probe.metric, probe.names, probe.shots) == ("linear", "accuracy", ("dark", "light"), None)
    assert probe.title == "Linear probe"
    assert probe.test == TestIdentity(held_out=0.2, seed=0)
    assert probe.data == ImageSet(name="img", path="/data/img")
    assert [(row.features, row.pool) for row in probe.rows][-1] == (PRETRAINED, "mean")
    first = EARLIER["probe-linear-img"]["rows"][0]
    assert (probe.rows[0].value, probe.rows[0].low, probe.rows[0].correct) == (
        first["accuracy"], first["low"], first["correct"],
    )  # fmt: skip
    assert probe.rows[0].fit == {"c": first["c"]}
    assert probe.row(RANDOM_INIT, "cls") is not None
    seeded = from_json(EARLIER["probe-knn-img-3-shots-seed-1"])
    assert isinstance(seeded, ProbeResult)
    assert (seeded.shots, seeded.budgets, seeded.test) == (3, (3,), TestIdentity(held_out=0.2, seed=1))


def test_tables_of_targets_and_curves_of_earlier_versions_are_converted():
    labels = from_json(EARLIER["targets-knn-img-by-t-red-odd-multilabel"])
    assert isinstance(labels, ProbeResult)
    assert (labels.task, labels.names) == (MULTILABEL, ("red", "odd"))
    assert labels.targets is not None
    assert (labels.targets.path, labels.targets.columns) == ("t.csv", ("red", "odd"))
    assert [(score.name, score.positives) for score in labels.rows[0].targets] == [("red", 3), ("odd", 5)]
    quantities = from_json(EARLIER["targets-linear-img-by-t-mean-regression"])
    assert isinstance(quantities, ProbeResult)
    assert (quantities.task, quantities.metric) == (REGRESSION, R2)
    assert quantities.rows[0].targets[0].mean_absolute_error is not None
    curve = from_json(EARLIER["curve-knn-img-1-3-shots-3-draws"])
    assert isinstance(curve, CurveResult)
    assert (curve.shots, curve.draws, [point.shots for point in curve.rows[0].points]) == ((1, 3), 3, [1, 3])
    assert len(curve.rows[0].points[0].values) == 3


def test_scores_and_baselines_of_earlier_versions_are_converted():
    score = from_json(EARLIER["ft-fine-tuned"])
    assert isinstance(score, FinetuneResult)
    assert (score.task, score.metric, score.step, score.test_images) == ("classify", "accuracy", 4, 8)
    assert score.value == 1.0
    assert score.best is not None
    assert score.test.held_out == 0.2
    baselines = from_json(EARLIER["baselines"])
    assert isinstance(baselines, BaselineLosses)
    assert baselines.losses[0] == (0, 2.944843)
    boxes = from_json({
        "task": "detect", "metric": "ap50", "ap": 0.1, "ap50": 0.3, "ap75": 0.2, "ap50_of_class": {"cat": None},
        "data": "cats", "test": "other-cats", "step": 4, "test_images": 3, "train_images": 9, "best": None,
        "averaged": None,
    })  # fmt: skip
    assert isinstance(boxes, FinetuneResult)
    assert (boxes.value, boxes.by_class) == (0.3, {"cat": None})
    assert boxes.test.images == ImageSet(name="other-cats")


@pytest.mark.parametrize("name", EARLIER)
def test_converted_result_is_a_valid_record(name):
    record = from_json(EARLIER[name])
    assert from_json(to_json(record)) == record


def test_baselines_of_the_first_version_raise_a_clear_error():
    with pytest.raises(UserError, match="measure again"):
        from_json({"step": 40, "images": 8, "loss": 0.5, "patch_mean": 1.0})


def test_image_sets_match_by_digest_or_by_name_if_it_is_unknown():
    moved = replace(BIRDS, name="flock", path="/elsewhere")
    changed = replace(BIRDS, digest="bb")
    unknown = replace(BIRDS, digest=None)
    assert BIRDS.matches(moved)
    assert not BIRDS.matches(changed)
    assert BIRDS.matches(unknown)
    assert not unknown.matches(moved)
    assert not unknown.matches(replace(unknown, excluded=("*.gif",)))
    assert HELD_OUT.matches(replace(HELD_OUT, seed=None)), "a missing seed means 0, the old default"
    assert not HELD_OUT.matches(replace(HELD_OUT, seed=1))
    assert not HELD_OUT.matches(TestIdentity(images=BIRDS))
    assert HELD_OUT.describe("birds") == "a held-out fifth of birds"
    assert TestIdentity(images=replace(BIRDS, excluded=("*.gif",))).describe("x") == "birds without *.gif"


def test_scores_are_comparable_if_only_the_encoder_differs():
    assert PROBE.same_measurement(replace(PROBE, step=80, rows=PROBE.rows[:1], verdict="other words"))
    for change in (
        {"kind": "knn"}, {"shots": 5}, {"seed": 1}, {"layer": "last"}, {"mask_votes": 2}, {"names": ("a", "c")},
        {"train_images": 161}, {"test": TestIdentity(held_out=0.2, seed=1)}, {"data": replace(BIRDS, digest="bb")},
    ):  # fmt: skip
        assert not PROBE.same_measurement(replace(PROBE, **change)), change
    assert not CURVE.same_measurement(replace(CURVE, draws=3))


def test_row_returns_the_best_pooling():
    assert PROBE.row() is PROBE.rows[1]
    assert PROBE.row(PRETRAINED, "cls") is PROBE.rows[2]
    assert PROBE.row(RANDOM_INIT) is None


def test_results_are_read_without_torch_or_numpy():
    code = "import sys, unmask.results; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
