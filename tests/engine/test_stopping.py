"""Stopping a run never hangs and loses no work: stalled workers, signals, suspended processes, killed parents."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import SMALL_RUN, pretrain
from faults import faults

from unmask.batch import ImageSpec
from unmask.data.augment import CropConfig
from unmask.data.decode.bad_image import BadImage
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, eval_batches, training_batches
from unmask.data.sources.open_source import open_source
from unmask.engine.continue_run import resume
from unmask.engine.fault_points import FaultPoints, injected
from unmask.engine.samples import read_baselines
from unmask.errors import LoadingFailed, TrainingFailed, UserError
from unmask.methods.mae import MAE
from unmask.run import Run
from unmask.system import processes, stalls
from unmask.system.stop_requests import StopRequest, StopRequested, interrupts, stop_requests

ENDLESS = ("train.steps=100000", "data.cache=false", "train.picture_every=1000000", "train.log_every=1")


def loader_images(folder: Path, **more):
    source = open_source(str(folder))
    spec = ImageSpec(3, (8, 8), "uint8", (0.0,) * 3, (1.0,) * 3)
    return ImageReader(source, np.arange(len(source)), spec, CropConfig(), **more)


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
    """Start a training run that does not finish by itself."""
    every = [*SMALL_RUN, *ENDLESS, f"data.workers={workers}", *settings]
    options = [text for setting in every for text in ("--set", setting)]
    return command("pretrain", images, "--recipe", "mae_nano", "--out", run, *options, **environment)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


# The loader


@pytest.mark.parametrize("evaluating", [False, True])
def test_stopped_worker_is_reported_with_its_file_and_ended(images, tmp_path, monkeypatch, evaluating):
    monkeypatch.setenv(stalls.VARIABLE, "1.5")
    data = loader_images(images, training=not evaluating)
    if evaluating:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        pool = eval_batches(data, np.arange(30).repeat(40), batch=2, workers=2)
    else:
        pool = training_batches(data, MicroBatches(0, 2, 1000), workers=2, folder=tmp_path)
    next(pool)
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(LoadingFailed) as caught:
        list(pool)
    assert time.monotonic() - began < 10
    assert re.search(rf"loader worker \d of 2 \(process {workers[0].pid}\) was stopped .*kill -CONT", str(caught.value))
    (stacks,) = tmp_path.glob("*stalled*.txt")
    text = stacks.read_text()
    assert str(stacks) in str(caught.value)
    assert "no answer" in text, "the report has no stack of the stopped worker"
    assert "in _work" in text, "the other worker wrote its own stack"
    assert "test_stopping.py" in text, "the report has the stacks of this process"
    assert not [worker for worker in workers if worker.is_alive()]


def test_file_that_never_ends_is_reported(images, tmp_path, monkeypatch):
    """The file acts like one on a network file system that does not respond."""
    monkeypatch.setenv(stalls.VARIABLE, "1")
    data = loader_images(images)
    real = type(data.source).read
    monkeypatch.setattr(type(data.source), "read", lambda self, row: time.sleep(60) if row == 7 else real(self, row))
    with pytest.raises(LoadingFailed, match=r"reading 0007\.png"):
        list(training_batches(data, MicroBatches(0, 10, 6), workers=1, folder=tmp_path))


def test_killed_worker_is_detected_at_once_even_if_others_hold_its_pipe(images):
    pool = training_batches(loader_images(images), MicroBatches(0, 2, 1000), workers=2)
    others = training_batches(loader_images(images), MicroBatches(0, 2, 1000), workers=1)  # forked later
    next(pool)
    first = min(multiprocessing.active_children(), key=lambda worker: worker.pid or 0)
    first.kill()
    began = time.monotonic()
    with pytest.raises(LoadingFailed, match="killed by signal 9; if it ran out of memory"):
        list(pool)
    assert time.monotonic() - began < 5
    assert len(next(others).batch) == 2
    with pytest.raises(StopIteration):
        next(pool)
    others.close()


class Shaped:
    """A reader that returns tensors of given shapes and strides, to test the transport from workers alone."""

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
def test_tensors_arrive_unchanged_even_if_larger_than_the_first(monkeypatch, memory_file):
    import torch

    from unmask.data import worker_pool, worker_transport

    if not memory_file:
        monkeypatch.setattr(worker_transport, "memory_file", lambda: None)
    requests = [1, 1, 2, 2000, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 900, 9, 10]
    got = list(worker_pool.WorkerPool(Shaped(), requests, 2, caught=BadImage))
    assert [one["number"] for one in got] == requests
    for one, request in zip(got, requests, strict=True):
        for name, value in Shaped().make(request, None).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(one[name], value)
        sent = Shaped().make(request, None)["channels last"]
        assert one["channels last"].stride() == sent.stride()


def test_error_in_a_worker_is_raised_in_the_main_process():
    from unmask.data.worker_pool import WorkerPool

    pool = WorkerPool(Shaped(), [1, "bad", 2, "fails", 3], 2, caught=BadImage)
    assert next(pool)["number"] == 1
    with pytest.raises(BadImage):
        next(pool)
    assert next(pool)["number"] == 2
    with pytest.raises(LoadingFailed, match=r"(?s)ValueError: as asked.*Traceback.*in make"):
        next(pool)


def test_dev_shm_is_not_used(images):
    """Docker limits /dev/shm to 64 MB, so the loader must not use /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    pool = training_batches(loader_images(images), MicroBatches(0, 30, 50), workers=2)
    for _ in range(5):
        next(pool)
        assert not [name for name in set(os.listdir("/dev/shm")) - before if str(os.getpid()) in name]
    pool.close()


def test_too_few_open_files_raise_a_clear_error(images, tmp_path):
    code = """
        import resource, sys
        sys.path[:0] = sys.argv[2:]
        from test_stopping import MicroBatches, loader_images, training_batches
        import pathlib
        used = len(list(pathlib.Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, used + 8))
        training_batches(loader_images(pathlib.Path(sys.argv[1])), MicroBatches(0, 2, 9), workers=8)
    """
    done = run_script(tmp_path, code, images, *Path(__file__).parents[:2])
    assert "LoadingFailed: cannot start 8 loader workers (Too many open files)" in done.stderr
    assert "ulimit -n 4096" in done.stderr


def test_suspended_time_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stalls.time, "monotonic", lambda: now[0])
    patience = stalls.Patience(1.0)
    now[0] += 3600  # suspended by Ctrl-Z for an hour
    assert not patience.tick()
    ticks = 0
    while not patience.tick():
        now[0] += stalls.TICK
        ticks += 1
    assert 2 <= ticks <= 4, "a gap of an hour counts as at most one tick"


@pytest.mark.parametrize(("text", "seconds"), [("", 300.0), ("7.5", 7.5), ("0", float("inf"))])
def test_stall_limit_is_read_from_the_environment(monkeypatch, text, seconds):
    monkeypatch.setenv(stalls.VARIABLE, text)
    assert stalls.stall_seconds() == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_stall_limit_must_be_a_number(monkeypatch, text):
    monkeypatch.setenv(stalls.VARIABLE, text)
    with pytest.raises(UserError, match=f"got {stalls.VARIABLE}={text}; expected"):
        stalls.stall_seconds()


# The watchdog


def test_step_that_never_ends_fails_and_writes_stacks(images, tmp_path, monkeypatch):
    monkeypatch.setenv(stalls.VARIABLE, "1")

    def hanging(job, at):
        if at.step == 2:
            while True:
                time.sleep(0.05)

    with (
        faults(before_step=hanging),
        pytest.raises(TrainingFailed, match=r"step 3 made no progress for 1 s.*stalled\.txt.*unmask resume"),
    ):
        pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=[*SMALL_RUN, "train.steps=5"])
    assert "in hanging" in (tmp_path / "run" / "stalled.txt").read_text()
    assert Run(tmp_path / "run").read("status.json")["state"] == "failed"
    monkeypatch.undo()
    assert resume(tmp_path / "run").read("status.json")["state"] == "finished"


def naps(count):
    for _ in range(count):
        time.sleep(0.05)


def test_computing_process_is_not_a_stall_but_a_waiting_one_is():
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
        with pytest.raises(stalls.Stalled), dog.watching("waiting", at_least=1.25):
            naps(200)
    assert told == ["waiting"]
    assert dog.waited == 1.25, "the report states the time limit that applied"


def test_step_that_finishes_during_the_stall_report_continues():
    """Writing the files of a report takes time, during which the step may finish."""
    reported, ended = threading.Event(), threading.Event()

    def report(what):
        reported.set()
        ended.wait(10)
        return what

    with stalls.Watchdog(0.3, report, on_cpu=False) as dog, dog.watching("waiting"):
        assert reported.wait(10)
    ended.set()
    dog._thread.join(10)
    naps(2)


# Stop requests


def test_stop_request_raises_only_in_interruptible_parts():
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
def test_every_signal_requests_a_stop(name):
    with stop_requests() as stop:
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_of_several_processes_prints_what_ctrl_c_does(monkeypatch, capfd, rank, lines):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    assert capfd.readouterr().err.count("stopping after this step") == lines


def test_ignored_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_during_a_wait_for_data_saves_a_checkpoint(images, tmp_path, monkeypatch, workers):
    """SIGTERM during the wait for a file that never ends saves a checkpoint, and no step is repeated."""
    plain = [*SMALL_RUN, "train.steps=12", "data.cache=false", f"data.workers={workers}"]
    whole = pretrain(images, recipe="mae_nano", out=tmp_path / "whole", settings=plain)
    real = ImageReader.__getitem__

    def waiting(self, taken):
        if self.training and taken.epoch[0] > 0:
            time.sleep(60)
        return real(self, taken)

    monkeypatch.setattr(ImageReader, "__getitem__", waiting)
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


@pytest.mark.parametrize("step", [0, 6, 12])
def test_picture_that_a_stop_request_interrupts_is_drawn_after_the_resume(images, tmp_path, monkeypatch, step):
    plain = [*SMALL_RUN, "train.steps=12", "train.picture_every=6", "data.held_out=4"]
    whole = pretrain(images, recipe="mae_nano", out=tmp_path / "whole", settings=plain)
    real = MAE.picture

    def stopped(self, batch, clock):
        if clock.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, clock)

    monkeypatch.setattr(MAE, "picture", stopped)
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=plain)
    status = run.read("status.json")
    assert (status["state"], status["step"]) == ("stopped", step)
    assert not (run.pictures / f"step-{step:08d}.png").exists()
    monkeypatch.undo()
    resume(run.path)
    assert read_baselines(run) == read_baselines(whole)
    assert [(row["step"], row.get("held_out_loss")) for row in run.metrics()] == [
        (row["step"], row.get("held_out_loss")) for row in whole.metrics()
    ]
    assert sorted(path.name for path in run.pictures.iterdir()) == sorted(
        path.name for path in whole.pictures.iterdir()
    )


def test_rows_of_step_0_are_logged_once_if_the_training_ends_before_the_first_checkpoint(images, tmp_path):
    def end(job, at):
        raise MemoryError

    run, plain = tmp_path / "run", [*SMALL_RUN, "train.steps=3", "data.held_out=4"]
    with injected(FaultPoints(before_step=end)), pytest.raises(MemoryError):
        pretrain(images, recipe="mae_nano", out=run, settings=plain)
    assert [row["step"] for row in Run(run).metrics()] == [0]
    assert [row["step"] for row in resume(run).metrics() if "held_out_loss" in row] == [0, 1, 2, 3]


def test_run_that_was_killed_while_the_first_checkpoint_was_written_begins_again(images, tmp_path):
    """The checkpoint is written in the background, so more steps may be done by then than it has."""

    def end(job, at):
        if at.step == 3:
            raise MemoryError

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place, plain = tmp_path / "run", [*SMALL_RUN, "train.steps=5"]
    with injected(FaultPoints(before_step=end, before_write=full)), pytest.raises(MemoryError):
        pretrain(images, recipe="mae_nano", out=place, settings=plain)
    run = Run(place)
    run.set_status("running", 0)
    run.write_heartbeat(3)
    assert (run.status().step, list(run.checkpoints.glob("step-*"))) == (3, [])
    assert [row["step"] for row in resume(place).metrics()] == [1, 2, 3, 4, 5]


def run_script(tmp_path: Path, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(code))
    return subprocess.run(
        [sys.executable, str(file), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


# Worker processes and their parents


def gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_pool_processes_end_if_their_parent_is_killed(tmp_path):
    """One worker is stopped and both ignore SIGTERM, but no process of a killed scan or `pack` may survive."""
    code = """
        import sys, time
        from unmask.system.processes import process_pool

        if __name__ == "__main__":
            with process_pool(2, int, ()) as pool:
                waits = [pool.submit(time.sleep, 60) for _ in range(2)]
                time.sleep(1)
                print(*[process.pid for process in pool._processes.values()], flush=True)
                time.sleep(60)
    """
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(code))
    parent = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pooled = [int(word) for word in parent.stdout.readline().split()]
    os.kill(pooled[0], signal.SIGTERM)
    os.kill(pooled[0], signal.SIGSTOP)
    time.sleep(0.2)
    assert not any(map(gone, pooled))
    parent.kill()
    parent.communicate()
    wait_until(lambda: all(map(gone, pooled)), 10)


def test_pool_that_is_left_by_an_error_does_not_wait():
    began = time.monotonic()

    def interrupted():
        with processes.process_pool(1, int, ()) as pool:
            pool.submit(time.sleep, 60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_loader_workers_end_if_the_training_is_killed(images, tmp_path):
    process = endless(images, tmp_path / "run", 2)
    wait_until(lambda: steps_of(tmp_path / "run") > 3)
    workers = [child.pid for child in children_of(process.pid)]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)
    process.kill()
    process.communicate()
    wait_until(lambda: all(map(gone, workers)), 10)


@pytest.mark.slow
def test_suspending_is_not_a_stall_and_sighup_saves(images, tmp_path):
    run = tmp_path / "run"
    process = endless(images, run, 1, **{stalls.VARIABLE: "1"})
    wait_until(lambda: steps_of(run) > 3)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(3)
    before = steps_of(run)
    os.killpg(process.pid, signal.SIGCONT)
    wait_until(lambda: steps_of(run) > before + 20)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert Run(run).read("status.json")["state"] == "stopped"


@pytest.mark.slow
def test_second_ctrl_c_ends_at_once_and_names_the_checkpoint(images, tmp_path):
    run = tmp_path / "run"
    process = endless(images, run, 0, "train.checkpoint_every=2")
    wait_until(lambda: steps_of(run) > 3)
    process.send_signal(signal.SIGSTOP)  # both signals arrive while the process is suspended
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert "Ctrl-C again ends at once: the checkpoint of step" in said
    # The exit code is 75 if the report had been written, and -SIGINT (shown as 130 by shells) if Python was shutting
    # down.
    assert process.returncode in (75, 130, -signal.SIGINT), said
    if process.returncode == 130:  # the process ended in the training loop or while writing the report
        kept = f"ended at once; the checkpoint of step {Run(run).read('status.json')['step']}"
        assert kept in said or f"Interrupted. Continue with: unmask resume {run}" in said


def test_second_ctrl_c_ends_a_blocking_library_call(tmp_path):
    code = """
        import os, signal, threading, time
        from unmask.system.stop_requests import stop_requests

        with stop_requests() as stop:
            stop.kept = "the checkpoint of step 7 is kept"
            for delay in (0.2, 1.2):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                try:
                    signal.pthread_sigmask(signal.SIG_BLOCK, [])
                    time.sleep(60)
                finally:
                    pass
    """
    began = time.monotonic()
    done = run_script(tmp_path, code)
    assert done.returncode == 130
    assert "ended at once; the checkpoint of step 7 is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("guarded", [False, True])
def test_script_without_a_main_guard_is_rejected_under_spawn(tmp_path, images, guarded):
    body = """
        stream = training_batches(loader_images(pathlib.Path(sys.argv[1])), MicroBatches(0, 2, 3), workers=1)
        print(len(list(stream)))
    """
    start = "if __name__ == '__main__':" if guarded else "if True:"
    code = f"""
        import multiprocessing, pathlib, sys
        sys.path[:0] = sys.argv[2:]
        multiprocessing.set_start_method("spawn", force=True)
        from test_stopping import MicroBatches, loader_images, training_batches
        {start}
    """
    code = textwrap.dedent(code) + textwrap.indent(textwrap.dedent(body), "    ")
    done = run_script(tmp_path, code, images, *Path(__file__).parents[:2])
    if guarded:
        assert done.stdout.strip() == "3", done.stderr
    else:
        assert "UserError" in done.stderr
        assert "outside a main guard" in done.stderr
        assert 'put the call under `if __name__ == "__main__":`' in done.stderr


# The launchers


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
    ],
)
def test_launchers_that_do_not_connect_processes_are_rejected(environment):
    with pytest.raises(UserError, match=r"expected processes that torchrun started.*`unmask launch`"):
        processes.reject_other_launchers(environment)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 2),
        ({"WORLD_SIZE": "2", "RANK": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 2),
        ({"SLURM_NTASKS": "4"}, 1),  # Inside an salloc shell.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, 1),  # Inside an sbatch script.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, 1),
    ],
)
def test_torchrun_and_single_processes_are_accepted(environment, count):
    processes.reject_other_launchers(environment)
    assert processes.launched(environment) == count


def test_verbs_that_do_not_divide_their_work_reject_launchers(monkeypatch, capsys):
    from unmask import commands

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for verb in (["demo"], ["ablate", "fig5", "nowhere"], ["report", "nowhere"]):
        monkeypatch.setattr(sys, "argv", ["unmask", *verb])
        with pytest.raises(SystemExit) as left:
            commands.main()
        assert left.value.code == commands.USAGE
        assert "got WORLD_SIZE=2" in capsys.readouterr().err


# Use as a library


def test_default_dtype_float64_changes_nothing(images, tmp_path):
    import torch

    from unmask.engine.load import load_encoder

    settings = [*SMALL_RUN, "train.steps=3"]
    plain = pretrain(images, recipe="mae_nano", out=tmp_path / "plain", settings=settings)
    torch.set_default_dtype(torch.float64)
    try:
        run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings)
        encoder = load_encoder(run.path)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        assert encoder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).patches.dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in plain.metrics()]


@pytest.mark.parametrize("device", ["mps", "cuda:77"])
def test_missing_device_raises_a_clear_error(images, tmp_path, device):
    from unmask.engine.load import load_encoder

    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=[*SMALL_RUN, "train.steps=1"])
    with pytest.raises(UserError, match=f"got device '{device}'; expected one of this machine"):
        load_encoder(run.path, device=device)


class Slow:
    """An object whose finaliser is interrupted."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def finalise_and_wait(seconds):
    Slow()
    naps(int(seconds / 0.05))


def test_interruption_in_a_finaliser_is_not_lost(recwarn):
    """Python prints exceptions that are raised in `__del__`, and continues."""
    with pytest.raises(KeyboardInterrupt), interrupts():
        finalise_and_wait(20)
    assert not [warning for warning in recwarn if "Exception ignored" in str(warning.message)]
