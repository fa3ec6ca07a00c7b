"""One drill of each kind; `scripts/kill-drills` does more of them at random moments, with other launchers too."""

import signal

import pytest
from drills import PICTURE, SAVE, TRAINING, Drills, Moment


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
