"""The processes that load batches: what the main process notices of them."""

import threading

import pytest

from unmask.data.worker_pool import WorkerPool
from unmask.errors import LoadingFailed


class Doubler:
    """A maker of the smallest kind."""

    def make(self, request, note):
        return 2 * request

    def name(self, row):
        return str(row)


def test_a_worker_that_died_while_it_had_nothing_to_do_is_reported_at_once(monkeypatch):
    monkeypatch.setenv("UNMASK_STALL_SECONDS", "5")
    dead = threading.Event()

    def requests():
        yield 1
        dead.wait()
        yield 2

    pool = WorkerPool(Doubler(), requests(), 1, caught=ValueError)
    try:
        assert next(pool) == 2
        process = pool.parts.workers[0].process
        process.kill()
        process.join()
        dead.set()  # the next request finds nobody to take it
        with pytest.raises(LoadingFailed, match="was killed by signal 9"):
            next(pool)
    finally:
        pool.close()
