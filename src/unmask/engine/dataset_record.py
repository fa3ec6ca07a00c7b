"""Check that a run's images, masks and test images have not changed since the run began, and record changes.

A run keeps a record of each data set that it reads (`data/scan/identity.py`): RUN/data.arrays for its training images,
and for a supervised run also masks.arrays, test.arrays and test-masks.arrays. Runs of earlier versions have no record.
For them, the names and sizes in the plan are compared, and a record is written afterwards. If the record was lost or
damaged later, this counts as a difference, because replaced files of the same size could not be detected without it.

Several processes compare the files that each of them sees, and all use the first difference that one of them has found.
One process writes the record.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmask.console import Console
from unmask.data.scan import identity
from unmask.data.scan.identity import Difference, record_of
from unmask.data.sources.source import Source
from unmask.engine import checkpoint
from unmask.engine.training_plan import Plan
from unmask.engine.world import current
from unmask.run import PROVENANCE, Run, RunError

DATA, MASKS, TEST, TEST_MASKS = "data", "masks", "test", "test-masks"
ONLY_NAMED = Difference(changed=[("some files", "different names or sizes; this run has no record of file contents")])


def file_of(run: Run, role: str) -> Path:
    return run.path / f"{role}.arrays"


def write_record(run: Run, source: Source, role: str = DATA) -> None:
    """Write the record of the files of `source`. Raises RunError if the record cannot be written."""
    path = file_of(run, role)
    try:
        run.write_file(path.name, record_of(source).write)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; free some space, or choose another --out"
        ) from None


def used_rows(plan: Plan, count: int) -> np.ndarray:
    """Return the rows that a run uses for training or evaluation; only these files must not change."""
    return np.setdiff1d(np.arange(count), np.setdiff1d(plan.excluded, [*plan.test_rows, *plan.held_out])).astype(
        np.int64
    )


def rows_now(run: Run, rows: Sequence[int], source: Source) -> tuple[int, ...]:
    """Return the current row numbers, sorted, of the images that were in these rows when the data set was recorded.

    The result leaves out missing images, and is () if the run has no record, like runs of earlier versions.
    """
    record = identity.read_record(file_of(run, DATA))
    if record is None or not rows:
        return ()
    names = {record.names[row] for row in rows if row < len(record.names)}
    return tuple(row for row, name in enumerate(source.names) if name in names)


def compare(run: Run, plan: Plan, source: Source, console: Console) -> Difference:
    """Return how the training images differ from the images at the start of the run. All processes must call this.

    Only files with a different modification time are read. If the content of these files is unchanged, the new times
    are recorded.
    """
    return _agreed(_difference(run, plan, source, console))


def _agreed(found: Difference) -> Difference:
    """Return the first difference that a process has found, in all processes."""
    return max(current().gather(found), key=bool)


def _difference(run: Run, plan: Plan, source: Source, console: Console) -> Difference:
    record = identity.read_record(file_of(run, DATA))
    if record is None:
        if source.fingerprint() != plan.fingerprint:
            return ONLY_NAMED
        if run.id is not None:
            return Difference(unknown=_trouble(run, DATA))
        console.warn(
            "an earlier version that kept no record of file contents began this run, so only the names and sizes of "
            "the images are compared"
        )
        write_record(run, source)
        return Difference()
    found = _compared(record, source, used_rows(plan, len(source)), console)
    if not found and found.reread:
        console.print(f"{found.reread} files have new modification times but the same content; resuming exactly")
        write_record(run, source)
    return found


def compare_or_record(run: Run, source: Source, role: str, console: Console) -> Difference:
    """Return how the files of masks or test images differ from the recorded files. The first call records the files.

    All processes must call this.
    """
    return _agreed(_difference_or_record(run, source, role, console))


def _difference_or_record(run: Run, source: Source, role: str, console: Console) -> Difference:
    was_there = file_of(run, role).exists()  # before it is read, because another process may write it meanwhile
    record = identity.read_record(file_of(run, role))
    if record is None:
        if was_there:
            return Difference(
                unknown=f"{_trouble(run, role)}; if the files are unchanged, remove it, and they are recorded again"
            )
        if checkpoint.newest_step(run):
            console.warn(f"{_trouble(run, role)}; recording the current files")
        with console.progress(f"recording {role}", len(source)) as bar:
            identity.digest_all(source, bar.update)
        write_record(run, source, role)
        return Difference()
    found = _compared(record, source, np.arange(len(source)), console)
    if not found and found.reread:
        write_record(run, source, role)
    return found


def _trouble(run: Run, role: str) -> str:
    path = file_of(run, role)
    return f"{path} {'is damaged' if path.exists() else 'is missing'}; without it replaced files cannot be detected"


def _compared(record: identity.DatasetRecord, source: Source, used: np.ndarray, console: Console) -> Difference:
    with console.progress("comparing files", len(used)) as bar:
        return identity.compare(record, source, used, bar.update)


def note_change(run: Run, what: str, **about: Any) -> str:
    """Add a change of the data to provenance.json, with the time and the step; return it as a message.

    what: "changed" or "recorded anew" (--allow-dataset-change), or "moved" (`resume --data`).
    """
    step, when = checkpoint.newest_step(run) or 0, time.strftime("%Y-%m-%dT%H:%M:%S%z")
    made = run.read_if_present(PROVENANCE)
    entry = {"what": what, "time": when, "step": step, **about}
    run.write("provenance.json", {**made, "data_changes": [*made.get("data_changes", []), entry]})
    return f"step {step}, {when}: images {what}" + (f" ({about['summary']})" if about.get("summary") else "")
