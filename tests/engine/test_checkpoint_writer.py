"""Checkpoints written in the background: exact, one at a time, with errors reported, and intact after a kill."""

import errno
import os
import signal
import threading
import time

import pytest
import torch
from conftest import SMALL_RUN, pretrain

from unmask.engine.checkpoint import load_latest, save
from unmask.engine.checkpoint_writer import CheckpointWriter, Snapshot
from unmask.engine.fault_points import FaultPoints, injected
from unmask.engine.world import ALONE
from unmask.run import Run

KINDS = ["dense", "dcp"]


@pytest.fixture
def run(tmp_path):
    made = Run.create(tmp_path / "run")
    made.write("config.json", {})
    return made


def tensors(step: int) -> dict[str, torch.Tensor]:
    whole = torch.full((5, 3), float(step))
    return {"w": whole, "turned": torch.arange(6.0).view(2, 3).T + step, "n": torch.tensor(step)}


def start(writer: CheckpointWriter, step: int, model=None) -> None:
    model = tensors(step) if model is None else model
    moments = {"w/exp_avg": torch.ones(5, 3), "w/step": torch.tensor(float(step))}
    writer.start(Snapshot(step, writer.copied(model), writer.copied(moments), {"optimizer": {"w/t": 2.5}}))


@pytest.mark.parametrize("kind", KINDS)
def test_state_at_the_call_is_saved_though_it_changes_at_once(run, kind):
    writer, model = CheckpointWriter(run, ALONE, kind, keep=2), tensors(1)
    held = threading.Event()
    with injected(FaultPoints(before_write=lambda path: held.wait(10))):
        start(writer, 1, model)
        for value in model.values():
            value.zero_()
        assert writer.busy
        assert not list(run.checkpoints.glob("step-*"))
        held.set()
        assert writer.finish() is None
    found = load_latest(run)
    assert all(torch.equal(found.model[name], value) for name, value in tensors(1).items())
    assert found.optim["w/step"] == 1
    assert found.state == {"optimizer": {"w/t": 2.5}}


def test_tensors_that_are_not_copied_would_be_saved_changed(run):
    """Negative control of the test above."""
    writer, model = CheckpointWriter(run, ALONE, "dense", keep=2), tensors(1)
    held = threading.Event()
    with injected(FaultPoints(before_write=lambda path: held.wait(10) and model["w"].zero_())):
        writer.start(Snapshot(1, {}, model, {}))
        model["n"].zero_()
        held.set()
        writer.finish()
    assert load_latest(run).optim["n"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dense_files_are_those_of_a_plain_save_and_shards_hold_the_same(run, tmp_path, kind):
    other = Run.create(tmp_path / "other")
    other.write("config.json", {})
    save(other, 3, tensors(3), {}, {})
    writer = CheckpointWriter(run, ALONE, kind, keep=2)
    writer.start(Snapshot(3, writer.copied(tensors(3)), {}, {}))
    assert writer.finish() is None
    if kind == "dense":
        names = ("model.safetensors", "optim.safetensors")
        assert [(run.checkpoints / "step-00000003" / name).read_bytes() for name in names] == [
            (other.checkpoints / "step-00000003" / name).read_bytes() for name in names
        ]
    one, two = load_latest(run).model, load_latest(other).model
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk_is_the_reason_and_other_errors_are_raised(run, kind):
    writer = CheckpointWriter(run, ALONE, kind, keep=2)
    start(writer, 1)
    assert writer.finish() is None

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with injected(FaultPoints(before_write=full)):
        start(writer, 2)
        assert "the disk is full; training continues, and older checkpoints are unchanged" in writer.finish()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["LATEST", "step-00000001"]
    start(writer, 3, {"w": torch.tensor([float("nan")])})
    assert "non-finite numbers, first w" in writer.finish()

    def wrong(path):
        raise ZeroDivisionError

    with injected(FaultPoints(before_write=wrong)):
        start(writer, 4)
        with pytest.raises((ZeroDivisionError, RuntimeError), match=None if kind == "dense" else "ZeroDivisionError"):
            writer.finish()
    assert not writer.busy
    start(writer, 5)
    assert writer.finish() is None
    assert load_latest(run, log=pytest.fail).step == 5


def test_second_checkpoint_needs_the_outcome_of_the_first(run):
    writer = CheckpointWriter(run, ALONE, "dense", keep=2)
    start(writer, 1)
    with pytest.raises(AssertionError, match="at most one"):
        start(writer, 2)
    writer.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", [0.0, 0.05, 0.15, 0.25])
def test_kill_during_a_background_write_leaves_an_intact_checkpoint(run, kind, moment):
    writer = CheckpointWriter(run, ALONE, kind, keep=2)
    start(writer, 1)
    writer.finish()
    child = os.fork()
    if child == 0:
        with injected(FaultPoints(before_write=lambda path: time.sleep(0.1))):
            start(CheckpointWriter(run, ALONE, kind, keep=2), 2)
            time.sleep(moment)
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert load_latest(run, log=pytest.fail).step in (1, 2)
    start(writer, 3)
    assert writer.finish() is None
    assert not list(run.checkpoints.glob(".tmp-*"))


@pytest.mark.parametrize("kind", ["auto", "dcp"])
def test_training_does_not_wait_for_the_disk_and_ends_with_the_last_step_saved(images, tmp_path, kind):
    """Steps are done while a checkpoint is being written; the last checkpoint is complete at the end."""
    at: dict[str, list[float]] = {"steps": [], "written": []}

    def slow(path):
        time.sleep(0.4)
        at["written"].append(time.monotonic())

    def note(job, step):
        at["steps"].append(time.monotonic())
        return step

    settings = [*SMALL_RUN, "train.steps=9", "train.checkpoint_every=4", f"train.checkpoint_format={kind}"]
    with injected(FaultPoints(before_write=slow, after_step=note)):
        run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings)
    assert load_latest(run, log=pytest.fail).step == 9
    first = at["written"][0]  # the first file of the checkpoint of step 1
    assert sum(time < first for time in at["steps"]) >= 2
    assert (run.checkpoints / "step-00000009/dcp").exists() == (kind == "dcp")
