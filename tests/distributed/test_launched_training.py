"""A training under `unmask launch` goes on after a kill and after a stop; its weights are those of an unbroken run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import small, write_images

LIMIT = 120
STEPS = 90
TRAIN = ["--recipe", "mae_nano", "--resume", "auto", *small(f"train.steps={STEPS}", "train.checkpoint_every=10")]


@contextmanager
def launched(folder: Path, out: str, *options: str):
    """Train in two processes; whatever is left of them at the end is killed."""
    command = [sys.executable, "-m", "unmask", "launch", "--processes", "2", "--timeout", "10", *options]
    process = subprocess.Popen(
        [*command, "pretrain", str(folder / "images"), "--out", str(folder / out), *TRAIN],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def finish(process: subprocess.Popen) -> str:
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return err


def steps(run: Path) -> int:
    return len((run / "metrics.jsonl").read_bytes().splitlines()) if (run / "metrics.jsonl").exists() else 0


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT
    while steps(run) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def result(run: Path) -> tuple[str, list[int]]:
    """Return the digest of the last weights, and the logged steps."""
    from unmask.run import Run

    weights = run / f"checkpoints/step-{STEPS:08d}/model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest(), [row["step"] for row in Run(run).metrics()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A folder with images and a run that was neither stopped nor killed."""
    folder = tmp_path_factory.mktemp("launched")
    write_images(folder / "images", 30)
    with launched(folder, "unbroken") as process:
        finish(process)
    return folder


def test_the_plan_is_made_for_both_processes(unbroken):
    assert json.loads((unbroken / "unbroken/plan.json").read_text())["processes"] == 2


def test_a_group_that_is_killed_and_stopped_has_the_weights_of_an_unbroken_run(unbroken):
    """After `kill -9` of one process the group is restarted; after a stop the same command continues the run."""
    with launched(unbroken, "broken", "--max-restarts", "3") as process:
        wait_for_step(unbroken / "broken", 25, process)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        workers[1].kill()
        wait_for_step(unbroken / "broken", 45, process)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, err
    assert f"process {workers[1].pid}) ended without a message" in err, err
    assert err.count("continue with: unmask resume") == 1, "one process prints"
    assert steps(unbroken / "broken") < STEPS, "stopped before the end"
    with launched(unbroken, "broken") as process:
        finish(process)
    assert result(unbroken / "broken") == result(unbroken / "unbroken")
