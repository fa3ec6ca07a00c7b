"""Checkpoints in shards: written by 2 processes, read by 1 and by 4, in both formats, damaged, and on a full disk."""

import errno
import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from checkpoint_group import digest
from group import run_script

from unmask.engine import checkpoint
from unmask.engine.checkpoint import CheckpointError, load_latest, load_model
from unmask.run import Run

LIMIT = 90
SCRIPT = Path(__file__).with_name("checkpoint_group.py")
SHARDS = ["dcp/shard-00001-model-00001-of-00001.safetensors", "dcp/shard-00002-model-00001-of-00001.safetensors"]


def in_processes(size: int, stage: str, run: Path, report: Path) -> list[dict]:
    """Run a stage in several processes, and return what each of them has seen."""
    run_script(size, SCRIPT, report.parent / f"{report.name}-output", stage, str(run), str(report), seconds=LIMIT)
    return [json.loads(Path(f"{report}-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints 1 and 2, which two processes wrote in shards, and what they have seen."""
    folder = tmp_path_factory.mktemp("sharded")
    Run.create(folder / "run").write("config.json", {})
    return folder / "run", in_processes(2, "save", folder / "run", folder / "save")


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the run, to be damaged."""
    return Run.open(shutil.copytree(saved[0], tmp_path / "run"))


def digests(found) -> dict[str, str]:
    return digest(found.model | found.optim)


def test_one_process_reads_the_shards_of_two_exactly(saved, run):
    expected = saved[1][0]["digests"]
    assert len(expected) == 6 + 1 + 6 * 3, "weights, a buffer, and three tensors of state for each weight"
    assert digests(load_latest(run)) == expected
    step, weights = load_model(run, 1)
    assert (step, digest(weights)) == (1, {name: expected[name] for name in weights})


def test_the_snapshot_is_saved_though_the_weights_change_meanwhile(saved, run):
    for seen in saved[1]:
        assert seen["outcome"] is None, "the weights change before the first file is written"
        assert seen["zero"]["layers.0.weight"] != seen["digests"]["layers.0.weight"]
    found = load_latest(run, log=pytest.fail)
    assert found.step == 2
    assert digests(found) == saved[1][0]["digests"]


@pytest.mark.parametrize("broken", [0, 1])
def test_full_disk_of_one_process_is_reported_by_all_and_leaves_nothing(saved, broken):
    for seen in saved[1]:
        assert f"by rank {broken} on {socket.gethostname()}: the disk is full" in seen[f"full {broken}"]
        assert "older checkpoints are unchanged" in seen[f"full {broken}"]
        assert seen[f"left {broken}"] == ["LATEST", "step-00000001", "step-00000002"]


def test_full_disk_is_reported_when_the_folder_of_the_shards_is_created(run, monkeypatch):
    make = Path.mkdir

    def full(path: Path, *args: object, **kwargs: object) -> None:
        if path.name == "dcp":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        make(path, *args, **kwargs)

    before = sorted(path.name for path in run.checkpoints.iterdir())
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(checkpoint.CheckpointFull, match="the disk is full"):
        checkpoint.save(run, 9, {"weight": torch.ones(3)}, {}, {}, kind="dcp")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before


def test_weights_that_are_not_finite_in_one_process_are_refused_by_all(saved):
    assert all("1 tensors contain non-finite numbers, first w" in seen["refused"] for seen in saved[1])


def test_no_pickle_is_written(saved):
    files = [path.relative_to(saved[0]).as_posix() for path in (saved[0] / "checkpoints").rglob("*") if path.is_file()]
    for step in (1, 2):
        own = {file.partition(f"step-{step:08d}/")[2] for file in files if f"step-{step:08d}/" in file}
        assert own == {*SHARDS, "state.json", "MANIFEST.json"}


def test_four_processes_read_the_shards_of_two_and_one_reads_theirs(saved, run, tmp_path):
    """The newest checkpoint is damaged: all processes rename it and use the one before."""
    flip(run.checkpoints / "step-00000002" / SHARDS[1], 1000)
    seen = in_processes(4, "load", run.path, tmp_path / "load")
    for each in seen:
        assert each["path"] == "step-00000001"
        assert each["digests"] == saved[1][0]["digests"]
    assert len(seen[0]["warnings"]) == 1
    assert f"{SHARDS[1]} has changed since it was written" in seen[0]["warnings"][0]
    assert (run.checkpoints / "step-00000002.corrupt").is_dir()
    assert len(list((run.checkpoints / "step-00000009/dcp").iterdir())) == 4
    assert digests(load_latest(run, log=pytest.fail)) == saved[1][0]["digests"]


def test_two_processes_read_a_dense_checkpoint_into_shards(saved, run, tmp_path):
    found = load_latest(run)
    checkpoint.save(run, 5, found.model, found.optim, found.state, keep=9)
    assert (run.checkpoints / "step-00000005/model.safetensors").exists()
    seen = in_processes(2, "load", run.path, tmp_path / "load")
    for each in seen:
        assert each["path"] is None
        assert each["digests"] == saved[1][0]["digests"]
    assert digests(load_latest(run, log=pytest.fail)) == saved[1][0]["digests"]


def flip(path: Path, offset: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*SHARDS, "state.json", "MANIFEST.json"])
def test_flipped_bit_in_any_file_is_found_and_the_previous_checkpoint_used(run, name):
    path = run.checkpoints / "step-00000002" / name
    sound = path.read_bytes()
    for number in range(12):
        flip(path, number * (len(sound) - 1) // 11, bit=number % 7)
        said: list[str] = []
        assert load_latest(run, log=said.append).step == 1
        assert "step-00000002" in said[0]
        assert name in said[0]
        with pytest.raises(CheckpointError):
            load_model(run, 2)
        (run.checkpoints / "step-00000002.corrupt").rename(run.checkpoints / "step-00000002")
        path.write_bytes(sound)
    assert load_latest(run, log=pytest.fail).step == 2


def truncate(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-4])


def remove(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()


def swap(folder: Path) -> None:
    first, second = (folder / name for name in SHARDS)
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)


def add(folder: Path) -> None:
    shutil.copy(folder / SHARDS[0], folder / "dcp/shard-00003-model-00001-of-00001.safetensors")


def without_digest(manifest: dict) -> dict:
    """Return a manifest as earlier versions wrote it, so that only the change itself can be noticed."""
    return {key: value for key, value in manifest.items() if key not in ("run_id", "sha256")}


def leave_out(folder: Path) -> None:
    """Remove a shard and its entry in the manifest, which DCP itself would not notice."""
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    del manifest["files"][SHARDS[0]]
    (folder / SHARDS[0]).unlink()
    (folder / "MANIFEST.json").write_text(json.dumps(without_digest(manifest)))


def point_outside(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    manifest["files"]["dcp/../../x.safetensors"] = manifest["files"].pop(SHARDS[1])
    (folder / "MANIFEST.json").write_text(json.dumps(without_digest(manifest)))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "bytes, but"),
        (remove, f"{SHARDS[0]} cannot be read"),
        (swap, f"{SHARDS[0]} has"),
        (add, "shard-00003-model-00001-of-00001.safetensors is not in MANIFEST.json"),
        (leave_out, "a part of model/layers."),
        (point_outside, "MANIFEST.json belongs to another checkpoint"),
    ],
)
def test_damaged_shards_are_found_and_the_previous_checkpoint_used(run, damage, named):
    damage(run.checkpoints / "step-00000002")
    said: list[str] = []
    assert load_latest(run, log=said.append).step == 1
    assert len(said) == 1
    assert named in said[0]


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_planted_pickle_is_never_opened(saved, run, tmp_path):
    """`.metadata` is where DCP's own format has a pickle; it is ignored. In place of a shard it is rejected."""
    marker, folder = tmp_path / "marker", run.checkpoints / "step-00000002"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "negative control: the payload works"
    marker.unlink()
    for place in (folder, folder / "dcp"):
        (place / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    assert digests(load_latest(run, log=pytest.fail)) == saved[1][0]["digests"]
    seen = in_processes(2, "load", run.path, tmp_path / "load")
    assert [each["path"] for each in seen] == ["step-00000002"] * 2
    shutil.rmtree(run.checkpoints / "step-00000009")
    torch.save({"x": Payload(marker)}, folder / SHARDS[0])
    said: list[str] = []
    assert load_latest(run, log=said.append).step == 1
    assert "is a pickle, not safetensors" in said[0]
    assert not marker.exists()
