"""One drill of each kind; `scripts/kill-drills` does more of them at random moments, with other launchers too."""

import signal
import sys
import time
from pathlib import Path

import pytest
from drills import PICTURE, PICTURES, SAVE, STOP_SECONDS, TRAINING, Drills, Moment
from group import outputs, start, wait


def test_run_that_is_killed_twice_and_stopped_equals_an_undisturbed_run(tmp_path):
    """Its checkpoints are shards, which two processes write, one, and two again.

    The picture during which it is stopped takes the writer 60 s, but all processes end within 20 s.
    """
    drills, run = Drills(tmp_path), tmp_path / "run"
    words = drills.words(run, "fsdp", "data.workers=2")
    one, _ = drills.killed(tmp_path / "1", words, 2, "direct", victim=1, moment=Moment(SAVE, 6, 0.1))
    two, _ = drills.killed(tmp_path / "2", words, 1, "direct", victim=None, moment=Moment(TRAINING, 12))
    three, _ = drills.stopped(
        tmp_path / "3", words, "direct", number=signal.SIGUSR1, target=1, moment=Moment(PICTURE, 0)
    )
    assert drills.require_stopped(run, three) == PICTURES
    four = drills.finished(tmp_path / "4", words, 2, "direct")
    assert drills.require_equal(run, one, two, three, four) == f"step {PICTURES}"


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
