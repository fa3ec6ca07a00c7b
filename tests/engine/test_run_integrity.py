"""Files that determine results are verified when read: bit flips, files of other runs and manual edits are detected."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import SMALL_RUN, pretrain, write_images

from unmask.comparison.compare_runs import compare
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine.continue_run import resume
from unmask.engine.load import load, read_config, read_plan
from unmask.report.run_page import write_report
from unmask.run import Run, RunError
from unmask.system.verified_json import ChangedJson, dump
from unmask.system.verified_json import load as parse

PROBE = {
    "kind": "knn", "data": "d", "test": "t", "shots": None, "seed": 0, "layer": None, "masks": None, "step": 4,
    "classes": ["a", "b"], "train_images": 8, "test_images": 8, "chance": 0.5, "task": "classes", "metric": "accuracy",
    "rows": [{"features": "pre-trained", "pool": "mean", "accuracy": 0.5, "low": 0.2, "high": 0.8, "correct": 4,
              "total": 8, "c": None}],
    "verdict": "", "protocol": "", "paths": ["d", "t"],
}  # fmt: skip


def train(folder, seed=0):
    images = folder / "images"
    if not images.exists():
        write_images(images, 12)
    settings = [*SMALL_RUN, "train.steps=4", "train.checkpoint_every=2", f"train.seed={seed}"]
    return pretrain(
        images, recipe="mae_nano", out=folder / f"run{seed}", settings=settings, console=Console(quiet=True)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of the same recipe with different seeds."""
    folder = tmp_path_factory.mktemp("trained")
    runs = [train(folder, seed) for seed in (0, 1)]
    for run in runs:
        run.write("evals/probe-knn-d.json", PROBE)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    for name in ("run0", "run1"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path / "run0", tmp_path / "run1"


def remove_digests(path):
    value = json.loads(path.read_bytes())
    for key in ("run_id", "sha256", "earlier_sha256"):
        value.pop(key, None)
    path.write_text(json.dumps(value))


def make_old(run):
    """Convert the run to the format of an earlier version."""
    for path in [*run.glob("*.json"), *run.glob("evals/*.json")]:
        remove_digests(path)
    for step in run.glob("checkpoints/step-*"):
        content = checkpoint.verify(step)["state.json"]
        old = json.dumps({key: value for key, value in json.loads(content).items() if key != "run"}).encode()
        manifest = json.loads((step / "MANIFEST.json").read_bytes())
        manifest["files"]["state.json"] = {"size": len(old), "sha256": hashlib.sha256(old).hexdigest()}
        (step / "state.json").write_bytes(old)
        (step / "MANIFEST.json").write_text(json.dumps({"step": manifest["step"], "files": manifest["files"]}))


@pytest.mark.parametrize("name", ["config.json", "plan.json", "provenance.json", "evals/probe-knn-d.json"])
def test_every_bit_flip_is_detected(runs, name):
    content = (runs[0] / name).read_bytes()
    assert parse(content).run_id == Run(runs[0]).id
    missed = []
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            try:
                found = parse(bytes(flipped))
            except ChangedJson:
                continue
            missed.append((place, bit, found))
    assert missed == []


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
def test_flipped_bit_raises_a_clear_error_in_every_command(runs, name):
    path = runs[0] / name
    path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1').replace(b'"peak_lr": 9', b'"peak_lr": 8'))
    for read in (load, resume, write_report, lambda run: compare(runs, out=runs[0].parent / "both.html")):
        with pytest.raises(RunError, match=rf"{name} has changed since it was written .*unmask set"):
            read(runs[0])


def test_removed_digest_is_detected(runs):
    for name in ("config.json", "plan.json", "provenance.json", "evals/probe-knn-d.json"):
        kept = (runs[0] / name).read_bytes()
        remove_digests(runs[0] / name)
        with pytest.raises(RunError, match=rf"{name} has no digest, but other files of this run have"):
            Run(runs[0]).read(name)
        (runs[0] / name).write_bytes(kept)
    for name in ("plan.json", "provenance.json", "config.json"):
        remove_digests(runs[0] / name)
    with pytest.raises(RunError, match=r"config\.json has no digest, but other files"):  # checkpoints have it
        load(runs[0])


def test_files_of_another_run_are_rejected(runs):
    for name in ("plan.json", "provenance.json", "evals/probe-knn-d.json", "status.json"):
        kept = (runs[0] / name).read_bytes()
        shutil.copy(runs[1] / name, runs[0] / name)
        with pytest.raises(RunError, match=rf"{name} belongs to run [0-9a-f]{{8}}, this is run [0-9a-f]{{8}}"):
            Run(runs[0]).read(name)
        (runs[0] / name).write_bytes(kept)


def test_checkpoint_of_another_run_is_renamed(runs, capsys):
    newest, before = "checkpoints/step-00000004", load(runs[0]).method.state_dict()
    shutil.rmtree(runs[0] / newest)
    shutil.copytree(runs[1] / newest, runs[0] / newest)
    assert load(runs[0]).step == 2
    assert "it belongs to run" in capsys.readouterr().err
    done = resume(runs[0], console=Console(quiet=True))
    assert done.finished
    assert (runs[0] / "checkpoints/step-00000004.corrupt").is_dir()
    after = load(runs[0]).method.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items()), "the last steps were repeated"
    shutil.rmtree(runs[0] / "checkpoints")
    shutil.copytree(runs[1] / "checkpoints", runs[0] / "checkpoints")
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of .* can be used: .*it belongs to run"):
        load(runs[0])
    with pytest.raises(checkpoint.CheckpointError, match="all are damaged or belong to another run"):
        resume(runs[0], console=Console(quiet=True))


def test_plan_older_than_the_checkpoint_is_detected(runs):
    run = Run(runs[0])
    old = (run.path / "plan.json").read_bytes()
    run.write("plan.json", run.read("plan.json") | {"reasons": ["changed"]})
    tensors = checkpoint.load_model(run)[1]
    assert checkpoint.load_model(run)[0] == 4, "a checkpoint that was written with the previous plan is accepted"
    checkpoint.save(run, 4, tensors, {}, {"step": 4})
    (run.path / "plan.json").write_bytes(old)
    assert checkpoint.load_model(Run(runs[0]), log=lambda _: None)[0] == 2
    with pytest.raises(checkpoint.CheckpointError, match=r"written with a different plan\.json"):
        checkpoint.load_model(Run(runs[0]), 4)


def test_every_bit_flip_in_a_manifest_is_detected(runs):
    run, folder = Run(runs[0]), runs[0] / "checkpoints/step-00000004"
    content = (folder / "MANIFEST.json").read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (folder / "MANIFEST.json").write_bytes(flipped)
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.require_own(run, folder, checkpoint.verify(folder))


def test_damaged_result_is_reported_and_not_shown(runs, capsys):
    file = runs[0] / "evals/probe-knn-d.json"
    file.write_bytes(file.read_bytes().replace(b'"accuracy": 0.5', b'"accuracy": 9.0'))
    page = write_report(runs[0]).read_text()
    assert "probe-knn-d.json has changed since it was written" in page
    assert "900.0 %" not in page
    assert "probe-knn-d.json has changed" in capsys.readouterr().err
    found = compare(runs, out=runs[0].parent / "both.html")
    assert found.probes == ()
    assert any("probe-knn-d.json has changed" in line for line in found.not_comparable)


def test_run_of_an_earlier_version_gets_digests_when_resumed(runs):
    run = runs[0]
    make_old(run)
    before = {name: torch.clone(value) for name, value in load(run).method.state_dict().items()}
    assert "0.5" in json.dumps(Run(run).read("evals/probe-knn-d.json"))
    shutil.rmtree(run / "checkpoints/step-00000004")
    resume(run, console=Console(quiet=True))
    assert all(torch.equal(before[name], value) for name, value in load(run).method.state_dict().items())
    assert Run(run).verified("config.json").sha256 is not None
    remove_digests(run / "plan.json")
    with pytest.raises(RunError, match=r"plan\.json has no digest"):
        read_plan(Run(run))
    read_config(Run(run))


def test_checkpoint_with_an_id_is_rejected_in_a_run_without_one(runs):
    make_old(runs[0])
    shutil.copytree(runs[1] / "checkpoints/step-00000004", runs[0] / "checkpoints/step-00000006")
    manifest = runs[0] / "checkpoints/step-00000006/MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 6'))
    with pytest.raises(RunError, match=r"config\.json has no digest, but other files"):
        load(runs[0])


def test_missing_fixed_file_is_reported(runs):
    for file in (runs[0] / "checkpoints").glob("fixed-*"):
        file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"fixed-.*safetensors is missing"):
        load(runs[0])


def test_reserved_keys_cannot_be_overwritten():
    with pytest.raises(AssertionError, match="these keys are reserved"):
        dump({"sha256": "x"}, None)
