"""One drill of each kind; `scripts/kill-drills` does more of them at random moments, with other launchers too."""

import signal
import sys
import time
from pathlib import Path

import pytest
from drills import PICTURE, SAVE, STOP_SECONDS, TRAINING, Drills, Moment
from group import outputs, start, wait


@pytest.fixture(scope="module")
def drills(tmp_path_factory):
    return Drills(tmp_path_factory.mktemp("drills"))


def test_process_killed_while_shards_are_saved(drills):
    moment = Moment(SAVE, 6, 0.1)
    drills.kill("save", victim=1, moment=moment, sizes=(2, 1), launcher="direct", parallel="fsdp")


def test_all_processes_killed(drills):
    moment = Moment(TRAINING, 13)
    drills.kill("all", victim=None, moment=moment, sizes=(1, 2), launcher="direct", parallel="ddp")


def test_stop_request_interrupts_a_picture_that_another_process_draws(drills):
    """The picture takes 60 s, but all processes end within 20 s, and the continued run draws it."""
    moment = Moment(PICTURE, 2)
    drills.stop("stop", number=signal.SIGUSR1, target=1, moment=moment, launcher="direct", parallel="ddp")


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_process_before_the_training_ends_all(tmp_path, rank):
    """Rank 1 waits for rank 0 in a C library, where Python handles no signals."""
    script = Path(__file__).with_name("waiting_group.py")
    started = start(2, [sys.executable, str(script), str(tmp_path)], tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    started[rank].send_signal(signal.SIGTERM)
    assert wait(started, STOP_SECONDS) == [130, 130], outputs(tmp_path)
    assert outputs(tmp_path).count("Interrupted.") == 1, outputs(tmp_path)
    assert "Traceback" not in outputs(tmp_path)
