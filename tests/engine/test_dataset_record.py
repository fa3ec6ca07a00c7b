"""A run resumes with unchanged files, or reports which changed; an allowed change is recorded in the run."""

import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
from faults import faults, signal_after
from test_pretraining import start

from unmask.config import ConfigError
from unmask.console import Console
from unmask.engine.changed_data import DataLocations
from unmask.engine.continue_run import resume
from unmask.engine.dataset_record import file_of
from unmask.engine.load import load, read_config, read_plan
from unmask.engine.training_data import DataError
from unmask.errors import UserError
from unmask.report.run_page import write_report


def arrays(folder, seed=0, count=30):
    """Write images whose file sizes do not depend on the seed."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        np.save(folder / f"{number:03d}.npy", random.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def stopped(tmp_path):
    """A run of six steps that was stopped after two."""
    arrays(tmp_path / "data")
    with signal_after(2):
        run = start(tmp_path / "data", tmp_path / "run", "train.steps=6")
    return run


def weights(run):
    return {name: value.numpy().tobytes() for name, value in load(run.path).method.state_dict().items()}


def test_replaced_files_of_the_same_size_stop_a_resume(stopped, tmp_path):
    arrays(tmp_path / "data", seed=1)
    with pytest.raises(DataError, match=r"30 files then, 30 now.*30 changed: 000.npy \(content\), .* and 25 more"):
        resume(stopped.path)
    arrays(tmp_path / "data")
    assert resume(stopped.path).read("status.json")["state"] == "finished"


def test_allowed_dataset_change_is_recorded_in_the_run(stopped, tmp_path):
    other = np.random.default_rng(9).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "data" / "004.npy", other)
    resume(stopped.path, allow_dataset_change=True)
    (entry,) = stopped.read("provenance.json")["data_changes"]
    assert (entry["what"], entry["step"], entry["num_changed"]) == ("changed", 2, 1)
    assert entry["changed"] == [{"name": "004.npy", "how": "content"}]
    assert any("step 2" in reason and "004.npy" in reason for reason in read_plan(stopped).reasons)
    assert "004.npy (content)" in write_report(stopped.path).read_text()


def test_copied_files_with_new_times_resume_and_the_times_are_recorded(stopped, tmp_path, capsys):
    for file in (tmp_path / "data").iterdir():
        os.utime(file)
    before = file_of(stopped, "data").read_bytes()
    resume(stopped.path, console=Console())
    assert "30 files have new modification times but the same content; resuming exactly" in capsys.readouterr().err
    assert file_of(stopped, "data").read_bytes() != before


def test_run_of_an_earlier_version_compares_names_and_sizes(stopped, tmp_path, capsys):
    file_of(stopped, "data").unlink()
    as_of_an_earlier_version(stopped)
    (tmp_path / "data" / "new.npy").write_bytes(b"")
    with pytest.raises(DataError, match="different names or sizes; this run has no record"):
        resume(stopped.path)
    (tmp_path / "data" / "new.npy").unlink()
    assert resume(stopped.path).read("status.json")["state"] == "finished"
    assert "only the names and sizes of the images are compared" in capsys.readouterr().err
    assert file_of(stopped, "data").exists()


def without_digest(manifest):
    """Return a manifest without a digest of its own, as earlier versions wrote it."""
    return {key: value for key, value in manifest.items() if key not in ("run_id", "sha256")}


def as_of_an_earlier_version(run):
    """Remove the digests and ids from a run's files, because earlier versions did not write them."""
    for path in (*run.path.glob("*.json"), *run.evals.glob("*.json")):
        value = json.loads(path.read_text())
        path.write_text(json.dumps({key: value[key] for key in value if key not in ("run_id", "sha256")}))
    for folder in run.checkpoints.glob("step-*"):
        state = json.loads((folder / "state.json").read_text())
        state.pop("run")
        content = json.dumps(state).encode()
        (folder / "state.json").write_bytes(content)
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        manifest.pop("run")
        manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "MANIFEST.json").write_text(json.dumps(without_digest(manifest)))


@pytest.mark.parametrize("trouble", ["missing", "damaged"])
def test_resume_with_a_lost_or_damaged_record_is_rejected(stopped, tmp_path, trouble):
    num_images = read_plan(stopped).num_images
    record = file_of(stopped, "data")
    if trouble == "missing":
        record.unlink()
    else:
        content = bytearray(record.read_bytes())
        content[500] ^= 1
        record.write_bytes(content)
    arrays(tmp_path / "data", seed=1)
    with pytest.raises(DataError, match=f"cannot be compared .*data.arrays is {trouble}.*--allow-dataset-change"):
        resume(stopped.path)
    assert resume(stopped.path, allow_dataset_change=True).finished
    [change] = stopped.read("provenance.json")["data_changes"]
    assert change["what"] == "recorded anew"
    assert trouble in change["summary"]
    assert read_plan(stopped).num_images == num_images
    assert change["time"] in read_plan(stopped).reasons[-1]
    assert file_of(stopped, "data").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_is_replaced_during_training_is_not_used(tmp_path, workers):
    data = arrays(tmp_path / "data")

    def replacing(job, step):
        if step.number == 1:
            for number in (3, 4):
                file = io.BytesIO()
                np.save(file, np.zeros((20, 24, 3), np.uint8))
                (data / f"{number:03d}.npy").write_bytes(file.getvalue())
        return step

    settings = ["train.steps=30", "data.cache=false", f"data.workers={workers}", "data.max_bad_fraction=0.1"]
    with faults(after_step=replacing):
        run = start(data, tmp_path / "run", *settings)
    noted = {(row["name"], row["code"]) for row in run.quarantine()}
    assert noted == {("003.npy", "CHANGED"), ("004.npy", "CHANGED")}


def test_allowed_changed_files_are_used_for_training(tmp_path):
    data = arrays(tmp_path / "data")

    def replacing(job, step):
        if step.number == 1:
            shutil.copyfile(data / "005.npy", data / "003.npy")
        if step.number == 12:
            os.kill(os.getpid(), 15)
        return step

    with faults(after_step=replacing):
        run = start(data, tmp_path / "run", "train.steps=14", "data.cache=false")
    assert [row["code"] for row in run.quarantine()] == ["CHANGED"]
    with pytest.raises(DataError, match=r"1 changed: 003.npy \(content\)"):
        resume(run.path)
    resume(run.path, allow_dataset_change=True)
    assert read_plan(run).excluded == ()
    assert len(run.quarantine()) == 1


def test_run_with_moved_data_resumes_exactly(stopped, tmp_path):
    whole = start(tmp_path / "data", tmp_path / "whole", "train.steps=6")
    shutil.copytree(tmp_path / "data", tmp_path / "moved" / "photos", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "data")
    moved = DataLocations((str(tmp_path / "moved" / "photos"),))
    np.save(tmp_path / "moved" / "photos" / "extra.npy", np.zeros((20, 24, 3), np.uint8))
    with pytest.raises(DataError, match=r"1 added: extra\.npy"):
        resume(stopped.path, places=moved)
    assert read_config(stopped).data.source == str(tmp_path / "data"), "a rejected resume does not change the run"
    (tmp_path / "moved" / "photos" / "extra.npy").unlink()
    with signal_after(4):
        resume(stopped.path, places=moved)
    resume(stopped.path)  # the new location has been recorded
    assert weights(stopped) == weights(whole)
    assert read_config(stopped).data.source == str(tmp_path / "moved" / "photos")
    (entry,) = stopped.read("provenance.json")["data_changes"]
    assert (entry["what"], entry["step"]) == ("moved", 2)
    assert entry["places"]["source"] == [str(tmp_path / "data"), str(tmp_path / "moved" / "photos")]
    with pytest.raises(ConfigError, match="got --test, but this run has no such data"):
        DataLocations(test="x").applied(read_config(stopped))


def test_several_sources_with_exclusions_are_trained_on_and_resumed(tmp_path, capsys):
    arrays(tmp_path / "one", seed=0, count=20)
    arrays(tmp_path / "two", seed=1, count=20)
    with signal_after(2):
        data = [tmp_path / "one", tmp_path / "two"]
        run = start(data, tmp_path / "run", "train.steps=4", exclude=["01?.npy"], console=Console())
    assert "20 images found" in capsys.readouterr().err
    data = read_config(run).data
    assert (data.source, data.exclude) == ((str(tmp_path / "one"), str(tmp_path / "two")), ("01?.npy",))
    assert read_plan(run).num_images == 20
    assert resume(run.path).read("status.json")["state"] == "finished"
    assert f"{tmp_path / 'one'}, {tmp_path / 'two'}" in write_report(run.path).read_text()
    with pytest.raises(ConfigError, match="give --exclude"):
        start(tmp_path / "one", tmp_path / "other", 'data.exclude=["x"]')


def test_missing_images_error_mentions_the_data_option(stopped, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"does not exist.*if the images have moved: unmask resume .*run --data NEW"):
        resume(stopped.path)
