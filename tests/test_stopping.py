"""Nothing hangs and nothing is lost: stalled workers, signals in every phase, suspended processes, dead parents."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import SMALL_RUN

from unmask import stalls
from unmask import train as loop
from unmask.batch import ImageSpec
from unmask.data.augment import CropConfig
from unmask.data.decode import BadImage
from unmask.data.loader import Images, eval_batches, training_batches
from unmask.data.sources import open_source
from unmask.errors import LoadingFailed, TrainingFailed, UserError
from unmask.run import Run
from unmask.start import pretrain, resume
from unmask.stopping import StopRequest, StopRequested, stop_requests

ENDLESS = ("train.steps=100000", "data.cache=false", "train.picture_every=1000000", "train.log_every=1")


def loader_images(folder: Path, **more):
    source = open_source(str(folder))
    spec = ImageSpec(3, (8, 8), "uint8", (0.0,) * 3, (1.0,) * 3)
    return Images(source, np.arange(len(source)), spec, CropConfig(), **more)


def children_of(process: int) -> list[psutil.Process]:
    return psutil.Process(process).children(recursive=True)


def command(*arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "unmask", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def endless(images: Path, run: Path, workers: int = 0, *settings: str, **environment: str) -> subprocess.Popen:
    """A training that will not finish by itself."""
    every = [*SMALL_RUN, *ENDLESS, f"data.workers={workers}", *settings]
    options = [text for setting in every for text in ("--set", setting)]
    return command("pretrain", images, "--recipe", "mae_nano", "--out", run, *options, **environment)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


# ----------------------------------------------------------------------------------------------------- the loader alone


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_stopped_worker_is_named_with_the_file_it_reads_and_ends(images, tmp_path, monkeypatch, evaluating):
    monkeypatch.setenv(stalls.VARIABLE, "1.5")
    data = loader_images(images, training=not evaluating)
    if evaluating:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        pool = eval_batches(data, np.arange(30).repeat(40), batch=2, workers=2)
    else:
        pool = training_batches(data, start=0, batch=2, batches=1000, workers=2, folder=tmp_path)
    next(pool)
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(LoadingFailed) as caught:
        list(pool)
    assert time.monotonic() - began < 10
    assert re.search(rf"loader worker \d of 2 \(process {workers[0].pid}\) was stopped .*kill -CONT", str(caught.value))
    assert re.search(r"reading \d{4}\.png", str(caught.value))
    (stacks,) = tmp_path.glob("*stalled*.txt")
    text = stacks.read_text()
    assert str(stacks) in str(caught.value)
    assert "no answer" in text, "of the stopped one"
    assert "in _work" in text, "of the other, from within"
    assert "test_stopping.py" in text, "of this process"
    assert not [worker for worker in workers if worker.is_alive()]


def test_a_file_that_never_ends_is_named(images, tmp_path, monkeypatch):
    """As on a network file system that does not answer."""
    monkeypatch.setenv(stalls.VARIABLE, "1")
    data = loader_images(images)
    real = type(data.source).read
    monkeypatch.setattr(type(data.source), "read", lambda self, row: time.sleep(60) if row == 7 else real(self, row))
    with pytest.raises(LoadingFailed, match=r"reading 0007\.png"):
        list(training_batches(data, start=0, batch=10, batches=6, workers=1, folder=tmp_path))


def test_a_killed_worker_is_noticed_at_once_also_when_others_hold_its_pipe(images):
    pool = training_batches(loader_images(images), start=0, batch=2, batches=1000, workers=2)
    others = training_batches(loader_images(images), start=0, batch=2, batches=1000, workers=1)  # forked later
    next(pool)
    first = min(multiprocessing.active_children(), key=lambda worker: worker.pid or 0)
    first.kill()
    began = time.monotonic()
    with pytest.raises(LoadingFailed, match="killed by signal 9; out of memory"):
        list(pool)
    assert time.monotonic() - began < 5
    assert len(next(others).batch) == 2
    with pytest.raises(StopIteration):
        next(pool)
    others.close()


class Shaped:
    """Batches of chosen shapes and strides, for the transport alone."""

    def make(self, request, note):
        import torch

        if request == "fails":
            raise ValueError("as asked")
        if request == "bad":
            raise BadImage("EMPTY", "as asked")
        generator = torch.Generator().manual_seed(request)
        return {
            "channels last": torch.randint(0, 255, (3, 4, 5, 1 + request), generator=generator).permute(0, 3, 1, 2),
            "16 bits": torch.randint(0, 60000, (2, 7), generator=generator).to(torch.uint16),
            "broadcast": torch.zeros(()).expand(3, 2),
            "none": torch.zeros(0, 3, 2, 2),
            "part": torch.arange(20)[3:9:2],
            "number": request,
        }

    def name(self, row):
        return str(row)


@pytest.mark.parametrize("memory_file", [True, False], ids=["memory file", "pipe"])
def test_tensors_arrive_as_they_were_also_larger_ones_than_the_first(monkeypatch, memory_file):
    import torch

    from unmask.data import worker_pool

    if not memory_file:
        monkeypatch.setattr(worker_pool, "_memory_file", lambda: None)
    requests = [1, 1, 2, 2000, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 900, 9, 10]
    got = list(worker_pool.WorkerPool(Shaped(), requests, 2, caught=BadImage))
    assert [one["number"] for one in got] == requests
    for one, request in zip(got, requests, strict=True):
        for name, value in Shaped().make(request, None).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(one[name], value)
        sent = Shaped().make(request, None)["channels last"]
        assert one["channels last"].stride() == sent.stride()


def test_what_a_worker_raises_comes_out_as_a_sentence_or_as_it_was():
    from unmask.data.worker_pool import WorkerPool

    pool = WorkerPool(Shaped(), [1, "bad", 2, "fails", 3], 2, caught=BadImage)
    assert next(pool)["number"] == 1
    with pytest.raises(BadImage):
        next(pool)
    assert next(pool)["number"] == 2
    with pytest.raises(LoadingFailed, match=r"(?s)ValueError: as asked.*Traceback.*in make"):
        next(pool)


def test_no_shared_memory_is_used_beside_the_anonymous_file(images, monkeypatch):
    """Docker gives /dev/shm 64 MB: nothing of ours may lie there."""
    before = set(os.listdir("/dev/shm"))
    pool = training_batches(loader_images(images), start=0, batch=30, batches=50, workers=2)
    for _ in range(5):
        next(pool)
        assert not [name for name in set(os.listdir("/dev/shm")) - before if str(os.getpid()) in name]
    pool.close()


def test_too_few_open_files_are_a_sentence(images, tmp_path):
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from test_stopping import loader_images, training_batches
        import pathlib
        used = len(list(pathlib.Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, used + 8))
        training_batches(loader_images(pathlib.Path(sys.argv[1])), start=0, batch=2, batches=9, workers=8)
    """
    done = run_script(tmp_path, code, images, Path(__file__).parent)
    assert "LoadingFailed: 8 loader workers could not be started (Too many open files)" in done.stderr
    assert "ulimit -n 4096" in done.stderr


def test_suspended_time_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stalls.time, "monotonic", lambda: now[0])
    patience = stalls.Patience(3.0)
    now[0] += 3600  # Ctrl-Z, and an hour later fg
    assert not patience.tick()
    ticks = 0
    while not patience.tick():
        now[0] += stalls.TICK
        ticks += 1
    assert 1 <= ticks * stalls.TICK <= 3.0


@pytest.mark.parametrize(("text", "seconds"), [("", 300.0), ("7.5", 7.5), ("0", float("inf"))])
def test_the_limit_is_a_setting(monkeypatch, text, seconds):
    monkeypatch.setenv(stalls.VARIABLE, text)
    assert stalls.stall_seconds() == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv(stalls.VARIABLE, text)
    with pytest.raises(UserError, match=f"got {stalls.VARIABLE}={text}; expected"):
        stalls.stall_seconds()


# -------------------------------------------------------------------------------------------------------- the watchdog


def test_a_step_that_never_ends_fails_with_stacks(images, tmp_path, monkeypatch):
    monkeypatch.setenv(stalls.VARIABLE, "1")
    real = loop.step

    def hanging(*arguments):
        if arguments[-1].step == 2:
            while True:
                time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(loop, "step", hanging)
    with pytest.raises(TrainingFailed, match=r"step 3 made no progress for 1 s.*stalled\.txt.*unmask resume"):
        pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=[*SMALL_RUN, "train.steps=5"])
    assert "in hanging" in (tmp_path / "run" / "stalled.txt").read_text()
    assert Run(tmp_path / "run").read("status.json")["state"] == "failed"
    monkeypatch.undo()
    assert resume(tmp_path / "run").read("status.json")["state"] == "finished"


def naps(count):
    for _ in range(count):
        time.sleep(0.05)


def test_a_slow_processor_is_no_hang_but_a_waiting_one_is():
    told = []

    def report(what):
        told.append(what)
        return what

    with stalls.Watchdog(1.0, report, on_cpu=True) as dog:
        with dog.watching("computing"):
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                pass
        with dog.watching("paused"), dog.pausing():
            time.sleep(1.5)
        assert not told
        with pytest.raises(stalls.Stalled), dog.watching("waiting"):
            naps(200)
    assert told == ["waiting"]


# ------------------------------------------------------------------------------------------------------ stop requests


def test_a_request_is_raised_only_where_it_does_no_harm():
    stop = StopRequest()
    stop.request()
    with pytest.raises(StopRequested), stop.interruptible():
        pytest.fail("it came before")
    stop = StopRequest()
    with stop.interruptible():
        with stop.interruptible():
            pass
        with pytest.raises(StopRequested):
            stop.request()
        stop.request()  # raised once
    stop.request()
    assert stop.requested


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_every_signal_asks_to_stop(name):
    with stop_requests() as stop:
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_while_waiting_for_data_saves_what_was_trained(images, tmp_path, monkeypatch, workers):
    """A file that never ends: SIGTERM in the middle of the wait leaves a checkpoint, and nothing is trained twice."""
    plain = [*SMALL_RUN, "train.steps=12", "data.cache=false", f"data.workers={workers}"]
    whole = pretrain(images, recipe="mae_nano", out=tmp_path / "whole", settings=plain)
    real = Images.__getitem__

    def waiting(self, taken):
        if self.training and taken.epoch[0] > 0:
            time.sleep(60)
        return real(self, taken)

    monkeypatch.setattr(Images, "__getitem__", waiting)
    threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=plain)
    assert time.monotonic() - began < 30
    status = run.read("status.json")
    assert (status["state"], status["step"]) == ("stopped", 4)
    monkeypatch.undo()
    rows = resume(run.path).metrics()
    assert {row["step"]: row["loss"] for row in rows}.items() >= {
        row["step"]: row["loss"] for row in whole.metrics()
    }.items()


def run_script(tmp_path: Path, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    import textwrap

    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(code))
    return subprocess.run(
        [sys.executable, str(file), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
