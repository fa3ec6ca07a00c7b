"""What one process does alone, while the others wait for it, affects neither other threads nor what follows."""

import threading

import pytest

from unmask.engine import world as module
from unmask.engine.world import World, alone, current, joined


@pytest.fixture
def two(monkeypatch):
    """The first of two processes, whose connection is not used."""
    world = World(size=2, local_size=2)
    monkeypatch.setattr(module, "_joined", world)
    return world


def test_alone_is_a_single_process_and_does_not_connect_again(two, monkeypatch):
    monkeypatch.setattr(module, "_connect", pytest.fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with alone():
        assert current().alone
        with joined() as world, alone():
            assert world.alone
        assert current().alone
    assert current() is two


def test_threads_that_overlap_while_alone_leave_the_others_connected(two):
    entered, leave_first, leave_second = threading.Event(), threading.Event(), threading.Event()

    def work(leave):
        with alone():
            entered.set()
            assert leave.wait(10)

    threads = []
    for leave in (leave_first, leave_second):
        entered.clear()
        threads.append(threading.Thread(target=work, args=(leave,)))
        threads[-1].start()
        assert entered.wait(10)
        assert current() is two, "the main thread does not work alone"
    for leave, thread in zip((leave_first, leave_second), threads, strict=True):
        leave.set()
        thread.join()
    assert current() is two
