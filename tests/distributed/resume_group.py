"""Resume a run whose images have changed, in one of several processes: `resume_group.py RUN REPORT`.

Rank 1 compares the images late: it waits for a while until another process has recorded the change. Instead of
training, each process writes the plan and the rows of its images to REPORT-RANK.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

from unmask.console import Console
from unmask.engine import continue_run, dataset_record

LATE = 3.0  # seconds; a process that does not wait for the others has recorded the change by then


def main(run: str, report: str) -> None:
    rank, compared = os.environ["RANK"], dataset_record._difference

    def late(run, *more):
        record, deadline = dataset_record.file_of(run, dataset_record.DATA), time.monotonic() + LATE
        before = record.stat().st_mtime_ns
        while rank == "1" and record.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.02)
        return compared(run, *more)

    def seen(inputs, supervise=None):
        rows = inputs.images.rows.tolist()
        Path(f"{report}-{rank}.json").write_text(json.dumps({"plan": inputs.plan.model_dump_json(), "rows": rows}))

    with patch.object(dataset_record, "_difference", late), patch.object(continue_run, "train_and_record", seen):
        continue_run.resume(run, allow_dataset_change=True, console=Console(quiet=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
