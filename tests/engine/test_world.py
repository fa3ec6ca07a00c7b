"""What one process does alone, while the others wait for it, affects neither other threads nor what follows."""

import re
import threading
from pathlib import Path

import pytest

from unmask.engine import world as module
from unmask.engine.world import World, alone, current, joined

AGREES = re.compile(
    r"\b(world|current\(\))\.(any|gather|to_writer|from_writer|on_writer|unless_stopped|require_same|means?|sum)\b"
)


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


def test_the_table_of_what_is_agreed_names_every_module_that_agrees():
    package = Path(module.__file__).parents[1]
    named = re.findall(r"`([\w/]+\.py)`", module.__doc__)
    named = {name if "/" in name else f"engine/{name}" for name in named}
    assert {name for name in named if not (package / name).is_file()} == set()
    files = {file.relative_to(package).as_posix(): file.read_text() for file in package.rglob("*.py")}
    agreeing = {name for name, text in files.items() if AGREES.search(text)}
    assert len(agreeing) > 20
    assert agreeing - named == set()
