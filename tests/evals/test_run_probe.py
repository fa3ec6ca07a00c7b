"""`unmask probe` with curves, attentive probes, other runs and tables of targets, on real files and runs."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN, pretrain, stored, write_images
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unmask.console import Console
from unmask.data.scan import scan_cache
from unmask.errors import UserError
from unmask.evals import feature_sets, probes
from unmask.evals import images as images_module
from unmask.evals import run_probe as run_probe_module
from unmask.evals.labelled_images import few_shots
from unmask.evals.probe_kind import kind_descriptions
from unmask.evals.probe_options import ProbeOptions, parse_shots
from unmask.evals.probes import attentive
from unmask.evals.run_probe import run_probe, run_probes
from unmask.report.run_page import write_report
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, OtherRun, from_json


class RecordingConsole(Console):
    """A console that records its messages."""

    def __init__(self):
        super().__init__(quiet=True)
        self.messages, self.warnings = [], []

    def print(self, text=""):
        self.messages.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs: a mae on images of 16 x 16 pixels, and an ae on images of 8 x 12 pixels."""
    folder = tmp_path_factory.mktemp("probing")
    images = write_images(folder / "images", 16)
    small = [*SMALL_RUN, "train.steps=2", "train.picture_every=9"]
    pretrain(images, recipe="mae_nano", out=folder / "mae", settings=small)
    dense = [each for each in small if "method" not in each]
    sizes = ["data.size=[8,12]", "method.encoder.hidden=[16]", "method.encoder.code=8"]
    pretrain(images, recipe="ae_nano", out=folder / "ae", settings=[*dense, *sizes])
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A writable copy of the run."""
    return Path(shutil.copytree(trained / "mae", tmp_path / "run"))


@pytest.fixture
def data(tmp_path):
    """60 images in three class folders that differ in brightness."""
    return write_images(tmp_path / "data", 60, classes=3)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Limit attentive heads to few training steps."""
    monkeypatch.setattr(attentive, "MIN_STEPS", 40)
    monkeypatch.setattr(attentive, "EPOCHS", 1)


def probe(run, data, *, console=None, kind="linear", **more):
    return run_probe(run, kind, ProbeOptions(data=str(data), device="cpu", **more), console or RecordingConsole())


def rows_of(summary):
    return {(row.features, row.pool): row for row in summary.rows}


def kept(run, name):
    return from_json(stored(run / "evals" / f"{name}.json"))


# Label budgets


def test_a_curve_fits_logistic_regression_to_features_computed_once(run, data, monkeypatch):
    tables = []
    real = feature_sets.features
    monkeypatch.setattr(feature_sets, "features", lambda *a, **more: tables.append(real(*a, **more)) or tables[-1])
    console = RecordingConsole()
    found = probe(run, data, shots=(8, 1, 3), label_draws=3, console=console)
    assert len(tables) == 2, "training and test images are encoded once each"
    train, test = (each[PRETRAINED] for each in tables)
    labels = np.repeat(np.arange(3), 20)
    index = np.setdiff1d(np.arange(60), test.index)
    picks = {
        (shots, draw): few_shots(index, labels[index], found.names, shots, 0, draw=draw)
        for shots in (1, 3, 8)
        for draw in range(3)
    }
    assert train.index.tolist() == sorted(set().union(*(set(rows) for rows in picks.values())))
    points = {point.shots: point for point in rows_of(found)[PRETRAINED, "mean"].points}
    assert tuple(points) == found.shots == (1, 3, 8)
    for (shots, draw), rows in picks.items():
        x = train.mean[np.searchsorted(train.index, rows)]
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=points[shots].fits[draw]["c"], max_iter=5000, tol=1e-8)
        right = model.fit(scaler.transform(x), labels[rows]).predict(scaler.transform(test.mean)) == labels[test.index]
        assert abs(int(right.sum()) - points[shots].correct[draw]) <= 1
    assert kept(run, "curve-linear-data-1-3-8-shots-3-draws") == found
    assert found.train_images == 24
    assert "1, 3, 8 labels per class, 3 draws of each" in found.protocol
    assert any("labels per class" in line and "8" in line for line in console.messages)
    page = write_report(run).read_text()
    assert "1, 3, 8 labels per class" in page
    assert "<svg" in page[page.index("Quality of the features") : page.index("<h2>Loss")]


def test_a_probe_with_one_number_of_shots_uses_the_first_draw_of_a_curve(run, data):
    one = probe(run, data, shots=3, controls=True)
    console = RecordingConsole()
    curve = probe(run, data, shots=3, label_draws=2, controls=True, console=console)
    assert "intervals over 2 draws of the labels are wide" in console.warnings[0]
    assert curve.shots == (3,)
    assert any("mean of 2 draws" in line for line in console.messages)
    for key, row in rows_of(curve).items():
        assert row.points[0].correct[0] == rows_of(one)[key].correct
    assert kept(run, "probe-linear-data-3-shots") == one
    assert [row.features for row in curve.rows] == [RAW_PIXELS, *[RANDOM_INIT] * 2, *[PRETRAINED] * 2]
    assert "Points above raw pixels" in curve.verdict
    assert probe(run, data, shots=(3, 3), controls=True).rows == one.rows, "a repeated number of labels counts once"


def test_results_of_another_folder_with_the_same_name_are_not_overwritten(run, data, tmp_path):
    first = probe(run, data)
    other = write_images(tmp_path / "elsewhere" / "data", 20, classes=2)
    second = probe(run, other)
    assert kept(run, "probe-linear-data") == first
    assert kept(run, "probe-linear-data-2") == second
    again = probe(run, data, controls=True)
    assert kept(run, "probe-linear-data") == again
    assert kept(run, "probe-linear-data-2") == second


def test_the_next_probe_uses_cached_features_unless_their_inputs_changed(run, data, monkeypatch):
    asked, real = [], images_module.collect_each
    monkeypatch.setattr(scan_cache, "WORTH_KEEPING", -1.0)
    monkeypatch.setattr(
        images_module,
        "collect_each",
        lambda encoders, *a, **more: asked.append(set(encoders)) or real(encoders, *a, **more),
    )
    console = RecordingConsole()
    first = probe(run, data, kind="knn", console=console)
    assert asked == [{PRETRAINED}] * 2
    assert sum("cached the features for later probes" in line for line in console.messages) == 2
    linear = probe(run, data)
    assert len(asked) == 2, "nothing was computed"
    assert linear.rows == probe(Path(shutil.copytree(run, run.with_name("bare"))), data).rows
    assert len(asked) == 2, "a copy of the run includes the cached features"
    asked.clear()
    assert probe(run, data, kind="knn", controls=True).rows[-len(first.rows) :] == first.rows
    assert asked == [{RAW_PIXELS, RANDOM_INIT}] * 2
    asked.clear()
    path = next((data / "class0").iterdir())
    Image.new("RGB", (16, 16), "green").save(path)
    probe(run, data, kind="knn")
    assert asked == [{PRETRAINED}] * 2, "a changed image makes the cached features invalid"
    probe(run, data, kind="attentive")
    assert len(asked) == 4, "features with tokens are not cached"


def test_an_unreadable_file_is_replaced_in_every_draw_of_labels(run, data):
    whole = probe(run, data, shots=(2, 4), label_draws=2)
    for path in sorted((data / "class1").iterdir())[:6]:
        path.write_bytes(b"no image")
    console = RecordingConsole()
    found = probe(run, data, shots=(2, 4), label_draws=2, console=console)
    assert found.train_images == whole.train_images == 12
    assert any("cannot be used" in line for line in console.warnings)
    with pytest.raises(UserError, match="class 'class0' has only 16 training images; use --shots 16 or fewer"):
        probe(run, data, shots=(2, 17))


def test_the_text_of_shots_is_parsed():
    assert parse_shots(None) is None
    assert parse_shots("5") == 5
    assert parse_shots("1, 5,10") == (1, 5, 10)
    for text in ("", "1,", "a", "1.5", "-1"):
        with pytest.raises(UserError, match="or several as 1,5,10"):
            parse_shots(text)


# Attentive probes


def test_an_attentive_probe_keeps_tokens_of_few_test_images_in_memory(run, data, monkeypatch):
    found = probe(run, data, kind="attentive", controls=True)
    assert kept(run, "probe-attentive-data") == found
    assert [(row.features, row.pool) for row in found.rows] == [
        (RAW_PIXELS, "pixels"), (RANDOM_INIT, "attentive"), (PRETRAINED, "attentive"),
    ]  # fmt: skip
    assert all(row.fit["rate"] in attentive.RATES for row in found.rows)
    assert "one learned query that attends to all tokens" in found.protocol
    assert "an attentive probe" in found.verdict.lower()
    assert rows_of(found)[RAW_PIXELS, "pixels"].value > 0.5, "classes differ in brightness"
    monkeypatch.setattr(run_probe_module, "TEST_PIECE", 5)
    again = probe(run, data, kind="attentive", controls=True)
    assert [row.correct for row in again.rows] == [row.correct for row in found.rows]
    options = ProbeOptions(data=str(data), shots=(2, 4), label_draws=2, device="cpu")
    both = run_probes(run, ("linear", "attentive"), options, RecordingConsole())
    alone = probe(run, data, shots=(2, 4), label_draws=2)
    assert both["linear"].rows == alone.rows
    assert both["attentive"].rows[0].points[0].fits[0]["rate"] in attentive.RATES


def test_an_encoder_with_one_token_has_a_linear_head(trained, tmp_path, data):
    run = Path(shutil.copytree(trained / "ae", tmp_path / "ae"))
    found = probe(run, data, kind="attentive")
    (row,) = found.rows
    assert row.total == 12


# New kinds

NEW_KIND = '''"""Strongest token: compare the maximum over tokens with the mean maximum of every class."""

import numpy as np

from unmask.evals.probe_kind import Fitted, TokenProbe
from unmask.results import CLASSES


def strongest(tokens):
    return (tokens.values.float() * tokens.scale + tokens.middle).amax(1).numpy()


def fit(tokens, positions, targets):
    x, known = strongest(tokens)[positions], np.unique(targets.y)
    centres = np.stack([x[targets.y == each].mean(0) for each in known])
    return Fitted(
        predict=lambda test: known[((strongest(test)[:, None] - centres) ** 2).sum(-1).argmin(1)].astype(np.int64)
    )


PROBE = TokenProbe(
    title="Probe of the strongest token", phrase="a probe of the strongest token", pool="strongest",
    pool_title="maximum over tokens", protocol=lambda task: "nearest class mean", fit=fit, tasks=frozenset({CLASSES}),
)
'''


@pytest.fixture
def new_kind(tmp_path, monkeypatch):
    """Add the file of a kind of probe to a folder in which the package looks for kinds."""
    folder = tmp_path / "probes"
    folder.mkdir()
    (folder / "strongest.py").write_text(NEW_KIND)
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(folder)])
    yield "strongest"
    sys.modules.pop("unmask.evals.probes.strongest", None)


def test_the_help_describes_every_kind_by_the_docstring_of_its_file(unmask):
    described = kind_descriptions()
    assert all(20 < len(each) < 90 for each in described.values())
    for verb in ("probe", "compare"):
        _, out, _ = unmask(verb, "--help")
        words = " ".join(out.replace("│", " ").split())
        assert f"Kind of probe: attentive ({described['attentive']}), knn (" in words


def test_a_new_kind_of_probe_is_described_by_its_docstring(new_kind):
    described = kind_descriptions()
    assert described[new_kind] == "compare the maximum over tokens with the mean maximum of every class"
    assert "unmask.evals.probes.strongest" not in sys.modules


def test_a_new_kind_of_probe_declares_the_name_of_its_pooling(run, trained, tmp_path, data, new_kind):
    other = Path(shutil.copytree(trained / "mae", tmp_path / "other"))
    found = probe(run, data, kind=new_kind, controls=True, against=(other,))
    assert [(row.features, row.pool) for row in found.rows] == [
        (RAW_PIXELS, "pixels"), (RANDOM_INIT, "strongest"), (PRETRAINED, "strongest"), ("other", "strongest"),
    ]  # fmt: skip
    assert "Frozen features (maximum over tokens; " in found.protocol
    assert "on the pre-trained features (maximum over tokens) gets" in found.verdict
    assert "Compared with other (maximum over tokens of both)" in found.verdict
    assert kept(run, "probe-strongest-data") == found
    curve = probe(run, data, kind=new_kind, shots=(1, 3), label_draws=2)
    assert "The pre-trained features (maximum over tokens) reach" in curve.verdict


def test_targets_that_a_kind_does_not_accept_are_rejected_before_computing_features(
    run, data, tmp_path, new_kind, monkeypatch
):
    monkeypatch.setattr(run_probe_module, "all_feature_sets", lambda *_, **__: pytest.fail("features were computed"))
    file = table(tmp_path / "t.csv", "path,mean", brightness(data).items())
    with pytest.raises(UserError, match="got targets of type regression, but --kind strongest accepts only classes"):
        probe(run, data, kind=new_kind, targets=file)


# Other runs


def test_another_run_gets_the_same_scores_as_when_probed_alone(run, trained, tmp_path, data):
    other = Path(shutil.copytree(trained / "ae", tmp_path / "other"))
    for kind in ("knn", "linear", "attentive"):
        found = probe(run, data, kind=kind, against=(other,))
        alone = probe(other, data, kind=kind)
        mine = probe(run, data, kind=kind)
        rows = rows_of(found)
        for (features, pool), row in rows_of(alone).items():
            assert features == PRETRAINED
            assert rows["other", pool].correct == row.correct
        for key, row in rows_of(mine).items():
            assert rows[key].correct == row.correct
        assert "Compared with other (" in found.verdict
    assert found.against == (OtherRun(name="other", run=str(other), step=2),)
    layered = probe(run, data, kind="knn", against=(other, trained / "mae"), layer="0")
    layers = {row.features: row.layer and row.layer.number for row in layered.rows}
    assert layers == {PRETRAINED: 0, "other": None, "mae": 0}, "all encoders with layers use the same layer"
    curve = probe(run, data, shots=(2, 4), label_draws=2, against=(other,))
    assert "Points above other:" in curve.verdict


def test_other_runs_have_unique_names(run, trained, tmp_path, data):
    second = Path(shutil.copytree(trained / "ae", tmp_path / "deep" / "run"))
    found = probe(run, data, kind="knn", against=(second,))
    assert found.rows[-1].features == str(second)
    for against in ([run], [second, second], [run / ".." / "run"]):
        with pytest.raises(UserError, match="is the run itself or was given twice"):
            probe(run, data, against=against)


# Tables of targets


def brightness(data):
    """The mean pixel value of each image, by the name of the image."""
    found = {}
    for path in sorted(data.rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(data).as_posix()] = float(np.asarray(image).mean())
    return found


def table(file, heading, rows):
    file.write_text("\n".join([heading, *(",".join(str(cell) for cell in row) for row in rows)]) + "\n")
    return file


def test_classes_of_a_table_give_the_same_result_as_folders(run, data, tmp_path):
    names = list(brightness(data))
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in names:
        shutil.copy(data / name, flat / name.replace("/", "-"))
    rows = [(name.replace("/", "-"), name.split("/")[0]) for name in names]
    file = table(tmp_path / "t.csv", "path,kind", rows)
    for kind in ("knn", "linear"):
        found = probe(run, flat, kind=kind, targets=file, controls=True)
        folders = probe(run, data, kind=kind, controls=True)
        assert found.rows == folders.rows
        assert (found.names, found.task, found.metric) == (folders.names, "classes", "accuracy")
        assert kept(run, f"targets-{kind}-flat-by-t-classes") == found
    curve = probe(run, flat, targets=file, shots=(1, 4), label_draws=2)
    assert curve.rows == probe(run, data, shots=(1, 4), label_draws=2).rows
    assert kept(run, "curve-linear-flat-1-4-shots-2-draws-by-t-classes") == curve


def test_a_table_replaces_folders_and_images_without_a_row_are_left_out(run, data, tmp_path):
    names = list(brightness(data))
    rows = [(name, int(name[-5]) % 2) for name in names[:50]]
    console = RecordingConsole()
    file = table(tmp_path / "t.csv", "path,odd", [*rows, ("gone.png", 1), ("away.png", 0)])
    found = probe(run, data, targets=file, console=console)
    assert found.train_images + found.test_images == 50
    assert found.names == ("0", "1")
    assert found.targets.images_without_row == 10
    assert console.warnings == [
        f"10 images have no row in {file} and are left out",
        f"2 rows of {file} match no image and are not used, for example away.png",
    ]
    assert any("classes, from the columns (0 and 1: odd); 50 rows have an image" in line for line in console.messages)
    assert str(file) in found.protocol


@pytest.mark.parametrize("kind", ["knn", "linear", "attentive"])
def test_quantities_and_multilabel_targets_are_predicted_from_the_features(run, data, tmp_path, kind):
    bright = brightness(data)
    file = table(tmp_path / "t.csv", "path,mean,half", [(name, value, value / 2 + 3) for name, value in bright.items()])
    console = RecordingConsole()
    found = probe(run, data, kind=kind, targets=file, controls=True, console=console)
    assert (found.task, found.metric, found.names) == ("regression", "R2", ("mean", "half"))
    assert found.train_images == 48
    best = max(row.value for row in found.rows if row.features == PRETRAINED)
    assert best > (0.3 if kind == "attentive" else 0.6)  # the head is trained for only 40 steps
    assert any("mean absolute error" in line for line in console.messages)
    assert kept(run, f"targets-{kind}-data-by-t-regression") == found
    bits = [(name, int(value > 100), int(value > 160), int(value > 60)) for name, value in bright.items()]
    file = table(tmp_path / "b.csv", "path,light,white,gray", bits)
    many = probe(run, data, kind=kind, targets=file, columns=("light", "white"))
    assert (many.task, many.metric) == ("multilabel", "mean average precision")
    row = many.rows[-1]
    assert row.value > many.chance + 0.2
    assert row.low <= row.value <= row.high
    assert kept(run, f"targets-{kind}-data-by-b-light-white-multilabel") == many
    page = write_report(run).read_text()
    assert f"multilabel of light, white in {file}" in page
    assert "Score of each target" in page
    assert "positive test images" in page


def test_test_images_have_rows_in_the_same_table_or_a_separate_one(run, data, tmp_path):
    test = write_images(tmp_path / "test", 12, classes=3, seed=1)
    bright, there = brightness(data), brightness(test)
    file = table(tmp_path / "t.csv", "path,mean", bright.items())
    other = table(tmp_path / "u.csv", "path,extra,mean", [(name, "x", value) for name, value in there.items()])
    found = probe(run, data, test=str(test), targets=file, test_targets=other)
    assert (found.train_images, found.test_images) == (60, 12)
    with pytest.raises(
        UserError, match=r"got an image .*0000.png in both .*data and .*test, so .* with --test-targets"
    ):
        probe(run, data, test=str(test), targets=file)
    for path in sorted(test.rglob("*.png")):
        path.rename(path.with_name(f"t{path.name}"))
    joint = table(tmp_path / "j.csv", "path,mean", [*bright.items(), *brightness(test).items()])
    again = probe(run, data, test=str(test), targets=joint)
    assert [row.value for row in again.rows] == pytest.approx([row.value for row in found.rows])


def test_options_that_would_be_ignored_are_rejected(run, data, tmp_path):
    file = table(tmp_path / "t.csv", "path,mean", brightness(data).items())
    for wish, said in (
        ({"label_draws": 3}, "got --label-draws 3 without --shots"),
        ({"label_draws": 1, "shots": (1, 2)}, "got --label-draws 1; expected at least 2"),
        ({"shots": ()}, "got no number of labels per class"),
        ({"target_type": "classes", "columns": ("a",)}, "got --columns, --target-type without --targets"),
        ({"targets": file, "test_targets": file}, "got --test-targets without --test"),
        ({"targets": file, "shots": 3}, "got --shots 3, which are labels per class, but the task is regression"),
        ({"targets": tmp_path / "no.csv"}, "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            probe(run, data, **wish)
    assert not list((run / "evals").glob("*linear*"))
