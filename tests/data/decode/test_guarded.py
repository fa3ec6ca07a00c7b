"""Calls in a separate process: limits are enforced, and every failure raises an exception in the caller."""

import os
import sys
import time

import pytest

from unmask.data.decode.limited_process import Crashed, TooSlow, call_in_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def limited(function, *arguments, memory=64 << 20, seconds=1.0):
    return call_in_process(function, *arguments, memory=memory, seconds=seconds)


def spin():
    while True:
        pass


def test_results_are_returned_and_errors_are_raised_in_the_caller():
    assert limited(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        limited(divmod, 7, 0)


def test_memory_is_limited():
    assert limited(lambda: len(bytes(16 << 20))) == 16 << 20
    with pytest.raises(MemoryError):
        limited(lambda: len(bytes(64 << 30)))  # far more memory than earlier tests can have freed in this process


def test_processor_time_is_limited():
    start = time.monotonic()
    with pytest.raises(TooSlow):
        limited(spin)
    assert time.monotonic() - start < 10


def test_wall_clock_time_is_limited():
    with pytest.raises(TooSlow):
        limited(time.sleep, 60, seconds=0.1)


def test_crash_raises_an_exception():
    with pytest.raises(Crashed):
        limited(os._exit, 9)
    with pytest.raises(Crashed):
        limited(os.abort)
