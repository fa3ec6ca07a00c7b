"""Comparing runs: shared probes are ranked, and differences between runs are listed."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL_RUN, pretrain, stored, write_images

from unmask.comparison import compare_runs as compare_module
from unmask.comparison import run_facts
from unmask.comparison.shared_probes import RankedRun, ranking
from unmask.errors import UserError
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.run_probe import run_probe
from unmask.interop.export_run import export_run
from unmask.interop.import_weights import import_weights
from unmask.results import PRETRAINED, FeatureScore, read_results, to_json
from unmask.run import Run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("compare") / "labelled", 20, classes=2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, labelled):
    """Two runs that differ in target and training length and have no probes."""
    folder = tmp_path_factory.mktemp("compare")
    few = [*SMALL_RUN, "train.picture_images=1"]
    pretrain(labelled, recipe="mae_nano", out=folder / "a", settings=[*few, "train.steps=2"])
    pretrain(labelled, recipe="mae_nano", out=folder / "b", settings=[*few, "train.steps=3", "method.target=pixels"])
    return folder / "a", folder / "b"


@pytest.fixture
def runs(trained, tmp_path):
    """Writable copies of the runs."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in trained]


def probe(run, data, **more):
    kind = more.pop("kind", "knn")
    options = ProbeOptions(data=data, device="cpu", **more)
    return run_probe(run, kind, options, compare_module.Console(quiet=True))


def compare(runs, *, out=Path("comparison.html"), **wanted):
    """The JSON object of a comparison."""
    return compare_module.compare(runs, compare_module.ProbeWanted(**wanted), out=out).to_json()


def facts(runs):
    return [run_facts.run_facts(Path(run).name, Run.open(run)) for run in runs]


def test_facts_and_cost_of_each_run_are_compared(runs, labelled, tmp_path):
    summary = compare(runs, out=tmp_path / "both.html")
    assert json.loads((tmp_path / "both.json").read_text()) == summary
    a, b = summary["runs"]
    assert [(run["name"], run["steps"], run["images_seen"], run["state"]) for run in (a, b)] == [
        ("a", 2, 16, "finished"), ("b", 3, 24, "finished"),
    ]  # fmt: skip
    assert "method.target=pixels" in b["differs"]
    assert not any("target" in setting for setting in a["differs"])
    assert a["flops"] == b["flops"]
    assert b["training_flops"] == b["flops"]["training"] * 24
    assert a["parameters"] > a["encoder_parameters"] > 0
    assert a["loss"] is not None
    assert a["images_per_second"] > 0
    assert summary["probes"] == []
    assert "No probe is shared by all of these runs" in summary["not_comparable"][0]


def test_a_run_that_was_killed_is_not_shown_as_running(runs, tmp_path):
    Run(runs[0]).write("status.json", stored(runs[0] / "status.json") | {"state": "running"})
    rows = compare(runs, out=tmp_path / "both.html")["runs"]
    assert [row["state"] for row in rows] == ["interrupted", "finished"]


def test_the_comparison_page_is_one_file_with_the_pictures_of_both_runs(runs, tmp_path):
    compare(runs, out=tmp_path / "both.html")
    page = html.unescape((tmp_path / "both.html").read_text())
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert "Losses with different targets" in page
    assert "not comparable" in page
    assert "method.target=pixels" in page


def test_a_probe_of_both_runs_is_compared(runs, labelled, tmp_path):
    accuracies = {run.name: max(row.value for row in probe(run, labelled).rows) for run in runs}
    summary = compare(runs, out=tmp_path / "both.html")
    (shared,) = summary["probes"]
    assert {row["name"]: row["score"]["value"] for row in shared["rows"]} == accuracies
    assert shared["rows"][0]["score"]["value"] == max(accuracies.values())
    assert set(shared["rows"][0]["pools"]) == {"cls", "mean"}
    assert summary["not_comparable"] == list(run_facts.differences(facts(runs)).values())
    assert shared["title"] == f"k nearest neighbours on {labelled}, tested on a held-out fifth of {labelled}"
    assert shared["title"] in html.unescape((tmp_path / "both.html").read_text())


def test_a_probe_without_mean_pooling_is_compared_by_its_own_pooling(runs, labelled, tmp_path):
    accuracies = {}
    for run, right in zip(runs, (3, 5), strict=True):
        found = probe(run, labelled, kind="attentive")
        accuracies[run.name] = found.rows[0].value
        row = FeatureScore(features=PRETRAINED, pool="cls", value=right / 8, low=0.1, high=0.9, correct=right, total=8)
        by_paper = replace(found, kind="paper-linear", rows=(row,))
        Run(run).write("evals/probe-paper-linear-train.json", to_json(by_paper))
    summary = compare(runs, out=tmp_path / "both.html")
    found = {shared["kind"]: shared["rows"] for shared in summary["probes"]}
    assert {row["name"]: row["score"]["value"] for row in found["attentive"]} == accuracies
    assert [(row["name"], row["score"]["pool"], row["score"]["value"]) for row in found["paper-linear"]] == [
        ("b", "cls", 5 / 8), ("a", "cls", 3 / 8),
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"kind": "linear"}, {"shots": 3}, {"seed": 1}])
def test_different_probes_are_listed_but_not_compared(runs, labelled, tmp_path, change):
    probe(runs[0], labelled)
    probe(runs[1], labelled, **change)
    summary = compare(runs, out=tmp_path / "both.html")
    assert summary["probes"] == []
    said = "\n".join(summary["not_comparable"])
    assert "was measured for a only" in said
    assert "was measured for b only" in said
    assert "No probe is shared" in said
    page = html.unescape((tmp_path / "both.html").read_text())
    assert page.count('class="verdict warning"') == 1, "all warnings are in one box"
    assert [line for line in summary["not_comparable"] if f"<li>{line}</li>" in page] == summary["not_comparable"]


def test_probes_with_different_test_images_are_not_compared(runs, labelled, tmp_path):
    test = write_images(tmp_path / "test", 8, classes=2, seed=3)
    probe(runs[0], labelled, test=str(test))
    write_images(test, 10, classes=2, seed=3)  # the same folder with more images
    probe(runs[1], labelled, test=str(test))
    summary = compare(runs, out=tmp_path / "both.html")
    assert summary["probes"] == []
    assert "(8 test images) was measured for a only" in "\n".join(summary["not_comparable"])


def test_only_runs_without_the_requested_probe_are_probed(runs, labelled, tmp_path, monkeypatch):
    probe(runs[0], labelled, kind="linear", shots=4)
    asked, real = [], compare_module.run_probe
    monkeypatch.setattr(compare_module, "run_probe", lambda run, *more: asked.append(run.name) or real(run, *more))
    options = {"data": labelled, "shots": 4, "out": tmp_path / "both.html", "device": "cpu"}
    (shared,) = compare(runs, **options)["probes"]
    assert asked == ["b"]
    assert shared["kind"] == "linear"
    assert {row["name"] for row in shared["rows"]} == {"a", "b"}
    compare(runs, **options)
    assert asked == ["b"], "and only once"


def test_runs_are_ranked_by_the_effective_rank_of_features_on_unlabelled_images(runs, labelled, tmp_path, monkeypatch):
    options = {"data": labelled, "kind": "rankme", "out": tmp_path / "both.html", "device": "cpu"}
    (shared,) = compare(runs, **options)["probes"]
    assert (shared["metric"], shared["chance"]) == ("effective rank", None)
    assert [row["score"]["low"] for row in shared["rows"]] == [None, None]
    assert "scores highest with" in shared["sentence"]
    monkeypatch.setattr(compare_module, "run_probe", lambda *_: pytest.fail("measured again"))
    assert compare(runs, **options)["probes"] == [shared]


def test_the_probe_of_the_latest_checkpoint_is_compared(runs, labelled, tmp_path):
    for run in runs:
        probe(run, labelled)
    (latest,) = read_results(Run(runs[1])).probes
    early = replace(latest, step=1, rows=tuple(replace(row, value=0.0) for row in latest.rows))
    Run(runs[1]).write("evals/probe-knn-labelled-step-1.json", to_json(early))
    (shared,) = compare(runs, out=tmp_path / "both.html")["probes"]
    assert {row["name"]: row["step"] for row in shared["rows"]} == {"a": 2, "b": 3}


def test_the_ranking_names_the_best_run_and_those_within_the_noise():
    def row(name, correct, total):
        value = correct / total
        score = FeatureScore(
            features="pre-trained", pool="cls", value=value, low=value - 0.03, high=value + 0.03, correct=correct,
            total=total,
        )  # fmt: skip
        return RankedRun(name, 2, score, {"cls": score})

    assert ranking([row("a", 800, 1000), row("b", 500, 1000)]) == (
        "a scores highest with 80.0% (class token); the margin is larger than the noise of the test images, but "
        "another training seed may change it"
    )
    assert ranking([row("a", 510, 1000), row("b", 500, 1000), row("c", 100, 1000)]) == (
        "a scores highest with 51.0% (class token), but the difference to b is within the noise of the test images"
    )


def test_runs_with_the_same_folder_name_are_named_by_their_paths(runs, tmp_path):
    other = Path(shutil.copytree(runs[0], tmp_path / "other" / "a"))
    names = [run["name"] for run in compare([runs[0], other], out=tmp_path / "both.html")["runs"]]
    assert names == [str(runs[0]), str(other)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "both.txt"}, r"got output file .*both.txt; expected a name that ends in .html"),
        ({"out": "nowhere/both.html"}, r"does not exist; create it"),
        ({"test": "shapes-test"}, r"--test or --shots without --data"),
        ({"kind": "rankme", "data": "x", "shots": 3}, r"got --test or --shots, but --kind rankme uses no labels"),
        ({"kind": "nearest"}, r"got --kind nearest; expected attentive, knn"),
    ],
)
def test_invalid_arguments_are_rejected(trained, change, message):
    with pytest.raises(UserError, match=message):
        compare(trained, **change)


def test_imported_runs_without_training_can_be_compared(trained, tmp_path):
    heads = ["method.encoder.heads=2", "method.decoder.heads=2"]
    export_run(trained[0], "official", tmp_path / "whole.pth")
    export_run(trained[0], "timm", tmp_path / "encoder.safetensors")
    whole = import_weights(tmp_path / "whole.pth", tmp_path / "whole", settings=heads)
    encoder = import_weights(tmp_path / "encoder.safetensors", tmp_path / "encoder", settings=heads[:1])
    first, second, third = compare([trained[0], whole.path, encoder.path], out=tmp_path / "all.html")["runs"]
    assert first["flops"] == second["flops"]
    assert (second["epochs"], second["images_seen"], second["training_flops"]) == (0, 0, 0)
    assert third["flops"]["whole"] == first["flops"]["whole"] > 0
    assert third["flops"]["training"] is third["flops"]["forward"] is third["training_flops"] is None
    assert "encoder without masking; it has no training task" in (tmp_path / "all.html").read_text()


def test_fewer_than_two_runs_or_a_repeated_run_are_rejected(trained, tmp_path):
    with pytest.raises(UserError, match=r"got 1 run; expected at least two"):
        compare(trained[:1], out=tmp_path / "both.html")
    with pytest.raises(UserError, match=r"got .* twice"):
        compare([trained[0], trained[0]], out=tmp_path / "both.html")
    with pytest.raises(UserError, match=r"is not a run"):
        compare([trained[0], tmp_path], out=tmp_path / "both.html")


def test_two_spellings_of_a_path_are_the_same_data(labelled, tmp_path):
    folder = Path(labelled)
    link = tmp_path / "link"
    link.symlink_to(folder)
    other = tmp_path / "other"
    other.mkdir()
    few = [*SMALL_RUN, "train.picture_images=1", "train.steps=1"]
    places = {"plain": folder, "dotted": folder / ".." / folder.name, "linked": link}
    for name, place in places.items():
        pretrain(place, recipe="mae_nano", out=tmp_path / name, settings=few)
    rows = [run_facts.run_facts(name, Run.open(tmp_path / name)) for name in places]
    assert len({row.source for row in rows}) == 3
    assert "data" not in run_facts.differences(rows)
    moved = replace(rows[0], place=run_facts.absolute_places(str(other)))
    assert "data" in run_facts.differences([moved, *rows[1:]])


def test_differences_other_than_the_method_are_listed_with_their_values(labelled, tmp_path):
    few = [*SMALL_RUN, "train.picture_images=1", "train.steps=2"]
    small = pretrain(labelled, recipe="mae_nano", out=tmp_path / "small", settings=few)
    large = pretrain(
        labelled, recipe="mae_nano", out=tmp_path / "large",
        settings=[*few, "data.size=[32,32]", "train.steps=4", "method.encoder.depth=2"],
    )  # fmt: skip
    for run in (small, large):
        probe(run.path, labelled)
    summary = compare([small.path, large.path], out=tmp_path / "both.html")
    said = "\n".join(summary["not_comparable"])
    assert "The image size differs: small 16 x 16, large 32 x 32." in said
    assert "The steps differ: small 2, large 4." in said
    assert "The epochs differ: small 0.8, large 1.6." in said
    assert re.search(r"The training compute differs: small [\d.e+]+ FLOPs, large [\d.e+]+ FLOPs", said)
    assert "The parameters of the encoder differ: small 0." in said
    assert "data" not in run_facts.differences(facts([small.path, large.path]))
    assert (
        "not a pure comparison of methods: the runs also differ in image size, steps"
        in summary["probes"][0]["sentence"]
    )
    again = shutil.copytree(small.path, tmp_path / "again")
    same = compare([small.path, again], out=tmp_path / "same.html")
    assert same["not_comparable"] == []
    assert "methods alone" not in same["probes"][0]["sentence"]
