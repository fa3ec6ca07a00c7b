"""A run that is killed with kill -9 and resumed with the real commands is bit-identical to an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL_RUN, write_images

from unmask.engine.checkpoint import load_model
from unmask.run import Run

STEPS = 60  # 16 epochs of 30 images in batches of 8: no checkpoint coincides with the end of an epoch
SETTINGS = [*SMALL_RUN, f"train.steps={STEPS}", "train.checkpoint_every=7", "train.picture_every=1000"]


def unmask(*arguments, wait=True):
    command = [sys.executable, "-m", "unmask.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def pretrain(images, out, workers=0, **more):
    flags = [flag for setting in [*SETTINGS, f"data.workers={workers}"] for flag in ("--set", setting)]
    return unmask("pretrain", images, "--recipe", "mae_nano", "--out", out, *flags, **more)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if Run(run).metrics_file.exists() and any(row["step"] >= step for row in Run(run).metrics()):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    pytest.fail("the run never got there")


def result(run: Path):
    """Return (losses of all steps, weights) of a finished run."""
    rows = Run(run).metrics()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step is logged exactly once, in order"
    return [row["loss"] for row in rows], load_model(Run(run))[1]


def same(a, b) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = pretrain(write_images(folder / "images", 30), folder / "run")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_twice_is_bit_identical_to_an_uninterrupted_run(unbroken, tmp_path, workers):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # pytest shows this output if the test fails
    first, second = sorted(random.Random(seed).sample(range(8, STEPS - 5), 2))
    run = tmp_path / "run"
    process = pretrain(unbroken / "images", run, workers, wait=False)
    for step in (first, second):
        wait_for_step(run, step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = unmask("resume", run, wait=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert same(result(run), result(unbroken / "run"))


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_code_75(unbroken, tmp_path):
    run = tmp_path / "run"
    process = pretrain(unbroken / "images", run, workers=2, wait=False)
    wait_for_step(run, 10, process)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.strip().splitlines()[-1].endswith(f"unmask resume {run}")
    status = Run(run).read("status.json")
    assert status["state"] == "stopped"
    assert Run(run).metrics()[-1]["step"] == status["step"] == load_model(Run(run))[0], "no step is lost"
    assert not [line for line in err.splitlines() if "Traceback" in line]

    # Ctrl-C has the same effect
    process = unmask("resume", run, wait=False)
    wait_for_step(run, status["step"] + 3, process)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 75), err
    if process.returncode == 75:
        assert unmask("resume", run).returncode == 0
    assert same(result(run), result(unbroken / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["position off by one", "step count lost"])
def test_negative_control_wrong_position_is_detected(unbroken, tmp_path, fault):
    run = tmp_path / "run"
    process = pretrain(unbroken / "images", run, wait=False)
    wait_for_step(run, 20, process)
    process.kill()
    process.communicate()
    tamper(run, fault)
    assert unmask("resume", run).returncode == 0
    assert not same(result(run), result(unbroken / "run"))


def without_digest(manifest):
    """Return a manifest without a digest of its own, as earlier versions wrote it."""
    return {key: value for key, value in manifest.items() if key not in ("run_id", "sha256")}


def tamper(run: Path, fault: str) -> None:
    """Damage the newest checkpoint and update its manifest to match."""
    import hashlib

    path = max((run / "checkpoints").glob("step-????????"))
    state = json.loads((path / "state.json").read_text())
    if fault == "position off by one":
        state["position"]["consumed"] += 1
        (path / "state.json").write_text(json.dumps(state))
    else:
        optim = safetensors.torch.load_file(path / "optim.safetensors")
        optim = {name: torch.zeros_like(value) if name.endswith("/step") else value for name, value in optim.items()}
        safetensors.torch.save_file(optim, path / "optim.safetensors")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "MANIFEST.json").write_text(json.dumps(without_digest(manifest)))


@pytest.mark.slow
def test_resume_of_finished_changed_and_locked_runs(unbroken, tmp_path):
    again = unmask("resume", unbroken / "run")
    assert again.returncode == 0
    assert "is finished" in again.stderr

    images = write_images(tmp_path / "images", 30)
    run = tmp_path / "run"
    process = pretrain(images, run, wait=False)
    wait_for_step(run, 8, process)
    process.send_signal(signal.SIGSTOP)  # suspend the process, so that it keeps the lock
    try:
        busy = unmask("resume", run)
    finally:
        process.kill()
        process.communicate()
    assert busy.returncode == 75, "the exit code tells a supervisor to try again later"
    assert f"in use by process {process.pid}" in busy.stderr
    (images / "0003.png").unlink()
    changed = unmask("resume", run)
    assert changed.returncode == 2
    assert "have changed" in changed.stderr
    assert "--allow-dataset-change" in changed.stderr
