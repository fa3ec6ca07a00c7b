"""Runs are created atomically, finish after all work is done, and save weights even if other files fail."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_RUN, pretrain, write_images
from faults import faults

from unmask.commands import STOPPED, explain
from unmask.console import Console
from unmask.engine import checkpoint, world
from unmask.engine import continue_run as module
from unmask.engine.continue_run import resume
from unmask.engine.load import load
from unmask.errors import TrainingFailed
from unmask.finetuning import finetune_run
from unmask.results import SCORE, read_score
from unmask.run import Run, RunError, RunInUse, held_here
from unmask.system import folder_lock

QUIET = Console(quiet=True)


def start(data, out, *settings, **more):
    return pretrain(data, recipe="mae_nano", out=out, settings=[*SMALL_RUN, *settings], console=QUIET, **more)


def weights(run):
    return load(run).method.state_dict()


def same(a, b):
    return all(torch.equal(a[name], value) for name, value in b.items())


# Creation


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("after", range(5))
def test_creation_killed_at_any_file_can_be_repeated(images, tmp_path, capsys, after):
    """SIGKILL interrupts one of the writes, so the process neither cleans up nor unlocks."""
    code = f"""
import os, signal, sys
from unmask import run as module
real, written = module.replace_file, []
def dying(path, content):
    if len(written) == {after}:
        path.with_name("." + path.name + ".1.partial").write_bytes(content[:10])
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path.name)
    real(path, content)
module.replace_file = dying
from unmask.engine.pretraining import PretrainOptions, pretrain
from unmask.console import Console
options = PretrainOptions(recipe="mae_nano", settings=sys.argv[3:])
pretrain(sys.argv[1], options, out=sys.argv[2], console=Console(quiet=True))
"""
    settings = [*SMALL_RUN, "train.steps=2"]
    done = subprocess.run([sys.executable, "-c", code, str(images), str(tmp_path / "run"), *settings], check=False)
    assert done.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    if (run / "plan.json").exists():
        assert resume(run, console=QUIET).finished, "a folder with a plan is a complete run"
        return
    with pytest.raises(RunError, match=r"its creation was interrupted .* rm -r|has no config\.json"):
        resume(run, console=QUIET)
    assert pretrain(images, recipe="mae_nano", out=run, settings=settings).finished
    said = capsys.readouterr().err
    assert ("removed files of a run whose creation was interrupted" in said) == (after > 0 or bool(files(run)))
    assert not [name for name in files(run) if "partial" in name]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["config.json", "provenance.json", "plan.json", "quarantine.jsonl"])
@pytest.mark.parametrize("existed", [False, True])
def test_failed_creation_leaves_no_files(tmp_path, monkeypatch, fault, name, existed):
    from unmask.system import atomic_files, json_lines

    real_replace, real_append = atomic_files.replace_file, json_lines.append

    def failing(real):
        def write(path, content):
            if path.name == name:
                raise fault
            real(path, content)

        return write

    monkeypatch.setattr("unmask.run.replace_file", failing(real_replace))
    monkeypatch.setattr(json_lines, "append", failing(real_append))
    if existed:
        (tmp_path / "run").mkdir()
    contents = {key: {"a": 1} for key in ("config.json", "provenance.json", "plan.json")}
    held_here.clear()
    with (
        pytest.raises(RunError if isinstance(fault, OSError) else KeyboardInterrupt),
        Run.begin(tmp_path / "run", contents, fill=lambda run: run.add_quarantine({"name": "x"})),
    ):
        pass
    assert (tmp_path / "run").exists() == existed
    assert not existed or not [file for file in files(tmp_path / "run") if file != ".lock"]
    assert held_here == [], "the message after Ctrl-C names no run to resume"
    monkeypatch.undo()
    with Run.begin(tmp_path / "run", contents):
        pass
    assert Run.open(tmp_path / "run").read("plan.json") == {"a": 1}


def test_run_created_by_another_process_before_the_lock_is_unchanged(tmp_path, monkeypatch):
    contents = {name: {"a": 1} for name in ("config.json", "provenance.json", "plan.json")}
    create = Run.create

    def overtaken(path):
        monkeypatch.undo()
        with Run.begin(path, contents):
            pass
        return create.__func__(_Lax, path)

    monkeypatch.setattr(Run, "create", overtaken)
    with pytest.raises(RunError, match="not empty"), Run.begin(tmp_path / "run", {**contents, "plan.json": {"a": 2}}):
        pass
    assert Run.open(tmp_path / "run").read("plan.json") == {"a": 1}


class _Lax(Run):
    @classmethod
    def check_free(cls, path):
        return cls(path)


def test_folder_with_other_files_is_never_reused(images, tmp_path):
    for name, content in (("config.json", '{"mine": 1}'), ("provenance.json", "{}"), ("a.txt", "precious")):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(RunError, match="not empty"):
            start(images, folder, "train.steps=1")
        assert (folder / name).read_text() == content
    run = start(images, tmp_path / "run", "train.steps=1")
    (run.path / "plan.json").unlink()  # the folder has weights, but no plan
    with pytest.raises(RunError, match="not empty"):
        start(images, run.path, "train.steps=1")
    assert checkpoint.newest_step(run) == 1


# Lock


def test_child_of_a_killed_process_does_not_keep_the_lock(tmp_path):
    """Like a hanging loader worker, the child is forked while the folder is locked, and outlives its parent."""
    run = Run.create(tmp_path / "run")
    code = """
import os, sys, time
from unmask.run import Run
with Run(sys.argv[1]).lock():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        said = rf"in use by process {holder.pid} on .*wait for it, or stop it"
        with pytest.raises(RunInUse, match=said) as caught, run.lock():
            pass
        assert explain(caught.value) == STOPPED, "the exit code tells a supervisor to try again"
        os.kill(child, signal.SIGSTOP)
        holder.kill()
        holder.wait()
        began = time.monotonic()
        with run.lock():
            pass
        assert time.monotonic() - began < 10, "the lock is free before the child ends, which sleeps for a minute"
    finally:
        os.kill(child, signal.SIGKILL)  # kill it first, because it holds the other end of the pipe
        holder.kill()
        holder.communicate()


def test_messages_about_the_holder_of_a_lock():
    def said(**about):
        about = {"pid": os.getppid(), "host": socket.gethostname(), "since": "now"} | about
        return folder_lock.describe_holder(json.dumps(about).encode())

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert f"process {gone.pid} on" in said(pid=gone.pid)
    assert "has ended" in said(pid=gone.pid)
    assert "in use by process" in said()
    assert "on elsewhere" in said(host="elsewhere")
    assert "stop it there" in said(host="elsewhere")
    assert "another process" in folder_lock.describe_holder(b"4711")
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        assert f"kill -CONT {stopped.pid}" in said(pid=stopped.pid)
    finally:
        stopped.kill()
        stopped.wait()


# Finished runs


def classes(folder):
    return write_images(folder, 24, classes=2)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    start(classes(folder / "images"), folder / "run", "train.steps=2")
    return folder


def tune(pretrained, out):
    quick = ["train.steps=4", "train.batch_size=8", "data.workers=0", "train.test_every=4", "train.device=cpu"]
    return finetune_run.finetune(
        pretrained / "run",
        str(pretrained / "images"),
        finetune_run.FinetuneOptions(settings=quick),
        out=out,
        console=QUIET,
    )


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_missing_result_of_fine_tuning_is_written_on_resume(pretrained, tmp_path, monkeypatch, fault):
    def failing(*_, **__):
        raise fault

    monkeypatch.setattr(finetune_run, "measure_run", failing)
    with pytest.raises(type(fault)):
        tune(pretrained, tmp_path / "tuned")
    run = Run.open(tmp_path / "tuned")
    assert run.status().state == ("stopped" if isinstance(fault, KeyboardInterrupt) else "failed")
    assert checkpoint.newest_step(run) == 4
    assert not run.finished
    assert not (run.path / SCORE).exists()
    monkeypatch.undo()
    assert finetune_run.resume(run.path, console=QUIET).finished
    assert read_score(run).step == 4


def test_lost_or_damaged_result_of_fine_tuning_is_measured_again(pretrained, tmp_path):
    run = tune(pretrained, tmp_path / "tuned")
    result = read_score(run)
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-40])):
        damage(run.path / SCORE)
        assert finetune_run.resume(run.path, console=QUIET).finished
        assert read_score(run) == result


@pytest.mark.parametrize("damage", ["flip", "missing", "truncated"])
def test_finished_run_with_a_damaged_last_checkpoint_repeats_steps(images, tmp_path, damage):
    run = start(images, tmp_path / "run", "train.steps=6", "train.checkpoint_every=4")
    before, last = weights(run.path), run.checkpoints / "step-00000006"
    file = last / "model.safetensors"
    if damage == "missing":
        shutil.rmtree(last)
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"" if damage == "truncated" else b"?"))
    assert resume(run.path, console=QUIET).finished
    assert checkpoint.is_complete(run, 6)
    assert same(before, weights(run.path))
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("lost", ["the folder", "what is in it"])
def test_run_without_its_checkpoints_does_not_restart(images, tmp_path, state, lost):
    run = start(images, tmp_path / "run", "train.steps=6", "train.checkpoint_every=4")
    run.set_status(state, 6, total=6)
    shutil.rmtree(run.checkpoints)
    if lost == "what is in it":
        run.checkpoints.mkdir()
    rows = run.metrics_file.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="contains no checkpoint, although this run had one of step 6"):
        resume(run.path, console=QUIET)
    assert run.metrics_file.read_bytes() == rows


# Failures of other files


def block(path):
    """Create a folder with the name of a file, so that nobody, not even root, can write the file."""
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("in the way")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "x").touch()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "status.json", "pictures", "evals", "quarantine.jsonl", "faults.jsonl", "report.html"]
)
@pytest.mark.parametrize("when", ["while it trains", "before it goes on"])
def test_failures_of_other_files_do_not_prevent_saving_weights(images, tmp_path, capsys, name, when):
    def blocking(job, at):
        if at.step == 3:
            if when == "while it trains":
                block(tmp_path / "run" / name)
            else:
                os.kill(os.getpid(), signal.SIGTERM)

    with faults(before_step=blocking):
        run = start(images, tmp_path / "run", "train.steps=6", "train.checkpoint_every=2", "train.picture_every=2")
    if when != "while it trains":
        assert run.status().state == "stopped"
        block(tmp_path / "run" / name)
        run = resume(run.path, console=QUIET)
    assert checkpoint.is_complete(run, 6)
    assert run.status().state == "finished"
    if name in ("metrics.jsonl", "status.json", "pictures", "evals"):
        assert name in capsys.readouterr().err
    whole = start(images, tmp_path / "whole", "train.steps=6")
    assert same(weights(run.path), weights(whole.path))


def test_folder_that_replaces_the_run_during_training_is_unchanged(images, tmp_path):
    def replacing(job, at):
        if at.step == 2:
            (tmp_path / "run").rename(tmp_path / "moved")
            with faults():  # no faults while the other run trains
                start(images, tmp_path / "run", "train.steps=1")

    with faults(before_step=replacing), pytest.raises(TrainingFailed, match="was deleted, moved or replaced"):
        start(images, tmp_path / "run", "train.steps=4")
    assert Run(tmp_path / "run").status().step == 1, "the status of the run that replaced the first one is unchanged"
    assert resume(tmp_path / "moved", console=QUIET).finished


def test_failure_of_another_process_after_the_training_does_not_change_the_state(images, tmp_path, monkeypatch):
    pulse = SimpleNamespace(on_failure=None)
    monkeypatch.setattr(world, "_pulse", pulse)
    run = start(images, tmp_path / "run", "train.steps=1")
    pulse.on_failure("rank 1 ended without a message")
    assert run.status().state == "finished"


# Interruptions


@pytest.mark.slow
def test_interruption_message_names_the_run(tmp_path, images):
    """SIGINT is sent before and after the run exists."""
    code = """
import sys
from unmask import commands
from unmask.engine import pretraining, start_run
def interrupted(*_, **__):
    raise KeyboardInterrupt
if sys.argv[1] == "before":
    pretraining.scan_source = interrupted
else:
    start_run.print_plan = interrupted
del sys.argv[1]
commands.main()
"""
    flags = [flag for setting in [*SMALL_RUN, "train.steps=2"] for flag in ("--set", setting)]
    for when, expected in (("before", ""), ("after", f" Continue with: unmask resume {tmp_path}/run")):
        done = subprocess.run(
            [sys.executable, "-c", code, when, "pretrain", images, "--recipe", "mae_nano", "--out", tmp_path / "run",
             *flags],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 130
        assert done.stderr.endswith(f"Interrupted.{expected}\n"), done.stderr
        assert (tmp_path / "run").exists() == (when == "after")
    assert module.resume(tmp_path / "run", console=QUIET).finished
