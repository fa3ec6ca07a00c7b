"""The stream of micro-batches that the loop trains on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

from unmask.batch import Batch
from unmask.data.decode.bad_image import BadImage
from unmask.data.loader import MicroBatches, training_batches
from unmask.data.scan.scan import BadFile
from unmask.engine.guard import Guard
from unmask.engine.job import Job, Position, report_failure
from unmask.errors import LoadingFailed, TrainingFailed
from unmask.run import Run

ENDLESS = 1 << 40  # upper limit of the number of micro-batches with a time budget, where the last step is not known


def open_stream(job: Job, at: Position, guard: Guard) -> Generator[Batch, None, None]:
    """Yield the micro-batches from position `at` to the end of the plan; record files that changed since the scan.

    Raises StopRequested for a stop request during a wait, and TrainingFailed if too many files have changed.
    """
    plan, world = job.plan, job.world
    count = (plan.steps - at.step) * plan.accumulation if plan.budget is None else ENDLESS
    deliveries = training_batches(
        job.images,
        MicroBatches(at.consumed, plan.micro_batch, count, world.rank, world.size),
        workers=plan.workers,
        pin=plan.device.startswith("cuda"),
        folder=job.run.path,
    )
    try:
        while True:
            with guard.waiting_for_data():
                delivery = next(deliveries, None)
            if delivery is None:
                return
            absent, bad = job.world.any(delivery.batch.valid is not None, bool(delivery.bad))
            if bad:
                quarantine(job, [one for part in job.world.gather(delivery.bad) for one in part], at)
            yield delivery.batch.with_valid() if absent else delivery.batch
    finally:
        deliveries.close()


@contextmanager
def loading_failures(run: Run) -> Iterator[None]:
    """Context manager that raises TrainingFailed if a loader worker dies or stalls, or if data are missing."""
    try:
        yield
    except BadImage as error:
        raise TrainingFailed(str(error)) from error
    except LoadingFailed as error:
        raise TrainingFailed(
            f"loading images stopped: {error}. `unmask resume {run.path}` continues from the last checkpoint. To find "
            f"the cause, run `unmask set {run.path} data.workers=0` first, so that the main process reads the files"
        ) from error


def quarantine(job: Job, unreadable: Iterable[BadFile], at: Position) -> None:
    """Record each file that has become unreadable since the scan once, in quarantine.jsonl.

    Raises TrainingFailed if more than `data.max_bad_fraction` of the images have become unreadable.
    """
    images = job.images
    for bad in unreadable:
        if bad.name in images.gone_bad:
            continue
        images.gone_bad.add(bad.name)
        with report_failure(job, job.run.quarantine_file):
            job.run.add_quarantine({"name": bad.name, "code": bad.code, "detail": bad.detail, "step": at.step})
        if len(images.gone_bad) > max(1, job.config.data.max_bad_fraction * len(images.rows)):
            raise TrainingFailed(
                f"{len(images.gone_bad)} of {len(images.rows)} images have become unreadable or changed since the "
                f"scan, the last {bad.name} ({bad.code}); see {job.run.quarantine_file}, restore the files, then "
                f"`unmask resume {job.run.path}`"
            )
