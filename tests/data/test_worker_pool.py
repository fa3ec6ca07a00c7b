"""Worker processes that load batches: how the main process detects their failure."""

import threading

import pytest

from unmask.data.worker_pool import WorkerPool
from unmask.errors import LoadingFailed


class Doubler:
    """A maker whose results are twice the request."""

    def make(self, request, note):
        return 2 * request

    def name(self, row):
        return str(row)


def test_death_of_an_idle_worker_is_reported_immediately(monkeypatch):
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
        dead.set()  # no worker is left for the next request
        with pytest.raises(LoadingFailed, match="was killed by signal 9"):
            next(pool)
    finally:
        pool.close()
