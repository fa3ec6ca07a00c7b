"""Test that the functions of `import unmask` do the same as the verbs of the command line, on a small run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN, small, write_images
from PIL import Image

import unmask
from unmask import commands
from unmask.comparison.compare_runs import Comparison
from unmask.console import Console
from unmask.errors import UserError
from unmask.results import CurveResult, EmbedResult, ExportResult, PredictResult, ProbeResult, ReconstructResult
from unmask.run import Run

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, labelled images, and a run that was trained from Python."""
    folder = tmp_path_factory.mktemp("api")
    write_images(folder / "images", 30)
    write_images(folder / "labelled", 40, classes=2)
    for name in ("run", "other"):
        run = unmask.pretrain(
            folder / "images",
            recipe="mae_nano",
            out=folder / name,
            settings=[*SMALL_RUN, "train.steps=3"],
            console=QUIET,
        )
        assert isinstance(run, Run)
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capfd):
    """Return a function that runs a command and returns the object that it prints with --json."""
    monkeypatch.chdir(folder)

    def cli(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments), "--json"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            commands.main()
        out, err = capfd.readouterr()
        assert stop.value.code == 0, err
        return json.loads(out)

    return cli


def test_pretrain_trains_the_same_run_and_writes_its_report(folder, cli):
    flags = [flag for setting in [*SMALL_RUN, "train.steps=3"] for flag in ("--set", setting)]
    found = cli("pretrain", "images", "--recipe", "mae_nano", "--out", "again", *flags)
    assert (found["state"], found["report"]) == ("finished", "again/report.html")
    losses = [[row.get("loss") for row in Run(folder / name).metrics()] for name in ("run", "again")]
    assert losses[0] == losses[1]
    assert (folder / "run" / "report.html").is_file()


def test_resume_continues_a_lengthened_run(folder, cli):
    cli("set", "other", "train.steps=5")
    run = unmask.resume(folder / "other", console=QUIET)
    assert (run.finished, run.status().step) == (True, 5)
    assert cli("resume", "other")["step"] == 5


def test_probe_gives_the_same_scores(folder, cli, monkeypatch):
    ours = unmask.probe("run", "labelled", kind="knn", shots=5, controls=True, console=QUIET)
    theirs = cli("probe", "run", "labelled", "--kind", "knn", "--shots", "5", "--controls")
    assert as_json(ours)["rows"] == theirs["rows"]
    assert len(theirs["rows"]) == 5
    assert as_json(unmask.probe("run", "labelled", shots=[1, 2], label_draws=2, console=QUIET))["shots"] == [1, 2]


def test_records_have_the_shell_command_and_python_calls_have_none(folder, cli, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--my-flag"])
    assert unmask.probe("run", "labelled", console=QUIET).command is None
    assert Run(folder / "run").read("provenance.json")["command"] is None
    assert cli("probe", "run", "labelled")["command"] == "unmask probe run labelled --json"
    cli("pretrain", "images", "--recipe", "mae_nano", "--out", "asked for", *small("train.steps=1"))
    command = Run(folder / "asked for").read("provenance.json")["command"]
    assert command.startswith("unmask pretrain images --recipe mae_nano --out 'asked for' --set 'data.size=")
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--my-flag"])
    assert unmask.probe("run", "labelled", console=QUIET).command is None, "calls from Python record no shell command"


def as_printed(result):
    """Return the object that --json prints for a result that was written to a file."""
    return json.loads(json.dumps(result.to_json()))


def test_the_reference_documents_the_results():
    page = (Path(__file__).parents[2] / "docs/reference/api.md").read_text()
    for result in (EmbedResult, ReconstructResult, PredictResult, ExportResult, Comparison, ProbeResult, CurveResult):
        assert f".. autoclass:: {result.__module__}.{result.__name__}\n" in page


def as_json(result):
    from unmask.results import to_json

    return result if isinstance(result, dict) else json.loads(json.dumps(to_json(result)))


def test_reconstruct_draws_the_same_picture(folder, cli):
    picture = folder / "images" / "0000.png"
    ours = unmask.reconstruct("run", picture, out="a.png", seed=3, console=QUIET)
    theirs = cli("reconstruct", "run", picture, "--out", "b.png", "--seed", 3)
    assert isinstance(ours, ReconstructResult)
    assert {"picture": "b.png", **ours.losses} == theirs
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert a.size[0] > 100


def test_embed_writes_the_same_table(folder, cli):
    ours = unmask.embed("run", ["images"], out="a.npz", console=QUIET)
    theirs = cli("embed", "run", "images", "--out", "b.npz")
    assert isinstance(ours, EmbedResult)
    assert as_printed(replace(ours, out="b.npz")) == theirs
    assert (ours.images, ours.columns) == (30, ("name", "cls", "mean"))
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


def test_finetune_and_predict_give_the_same_losses_and_predictions(folder, cli):
    few = ["train.steps=2", "train.batch_size=8", "train.device=cpu"]
    run = unmask.finetune("run", "labelled", recipe="finetune_few", out="tuned", shots=4, settings=few, console=QUIET)
    assert run.finished
    flags = [flag for setting in few for flag in ("--set", setting)]
    cli("finetune", "run", "labelled", "--recipe", "finetune_few", "--out", "tuned2", "--shots", 4, *flags)
    losses = [[row.get("loss") for row in Run(folder / name).metrics()] for name in ("tuned", "tuned2")]
    assert losses[0] == losses[1]
    ours = unmask.predict("tuned", "labelled", out="a.csv", console=QUIET)
    theirs = cli("predict", "tuned", "labelled", "--out", "b.csv")
    assert isinstance(ours, PredictResult)
    assert as_printed(replace(ours, out="b.csv")) == theirs
    assert (folder / "a.csv").read_text() == (folder / "b.csv").read_text()


def test_export_and_import_keep_the_weights(folder, cli):
    ours = unmask.export("run", to="official", out="a.pth", console=QUIET)
    theirs = cli("export", "run", "--to", "official", "--out", "b.pth")
    assert isinstance(ours, ExportResult)
    assert as_printed(replace(ours, out="b.pth", card="b.pth.md", load=ours.load.replace("a.pth", "b.pth"))) == theirs
    settings = ["data.size=[16,16]"]
    run = unmask.import_weights("a.pth", out="imported", settings=settings, console=QUIET)
    imported = cli("import", "b.pth", "--out", "imported2", "--set", settings[0])
    assert imported["run"] == "imported2"
    before, after = (unmask.load_encoder(path).state_dict() for path in ("run", run.path))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_compare_writes_the_same_page(folder, cli):
    ours = unmask.compare(["run", "other"], out="a.html", console=QUIET)
    theirs = cli("compare", "run", "other", "--out", "b.html")
    assert isinstance(ours, Comparison)
    ours = as_printed(ours)
    assert ours.pop("written") <= theirs.pop("written")
    assert ours == theirs
    assert (folder / "a.html").is_file()


def test_invalid_arguments_raise_user_error_or_type_error(folder, cli):
    with pytest.raises(UserError, match="is not a folder"):
        unmask.probe("nowhere", "labelled", console=QUIET)
    with pytest.raises(TypeError, match="unexpected keyword argument 'knd'"):
        unmask.probe("run", "labelled", knd="linear")  # type: ignore[call-arg]


def test_budget_of_a_python_call_counts_from_the_call(folder, monkeypatch, cli):
    """The budget must not count from the start of the process, which may be hours ago in a notebook."""
    seen = []

    def stop(*_, budget, **__):
        from unmask.engine.time_budget import as_budget

        seen.append(as_budget(budget))
        raise UserError("enough")

    monkeypatch.setattr("unmask.engine.pretraining.pretrain", stop)
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: 1e9)
    with pytest.raises(UserError, match="enough"):
        unmask.pretrain("images", budget="30m", console=QUIET)
    assert (seen[0].seconds, seen[0].began) == (1800, 1e9)


def test_python_functions_suggest_the_nearest_keyword():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'budgett'; did you mean budget\?"):
        unmask.pretrain("shapes", budgett="30m")
