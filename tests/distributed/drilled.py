"""`unmask` with a record of what it does, in one of the processes that a drill stops or kills; see `drills.py`.

$DRILL_RECORD/RANK-PID.jsonl gets a row for each event: `begin`, `connected` (to the others), `training` (the images are
scanned), `samples` (of a micro-batch), `step`, `picture`, `write` (a file of a checkpoint), `saved` and `restored`
(digests of the gathered weights and moments), `end` (the exit code). $DRILL_SLOW is a JSON object with the seconds that
are added to each `step`, to each `write`, and to each `picture` from number `first` on.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

NAP = 0.02  # a process that sleeps can be interrupted by its own signals only


def digest(*tensors: Any) -> str:
    """Return the SHA-256 of the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class Record:
    """Appends events in one call each, because the process may be killed at any time."""

    def __init__(self) -> None:
        self.rank = os.environ.get("RANK", "0")
        self.path = Path(os.environ["DRILL_RECORD"]) / f"{self.rank}-{os.getpid()}.jsonl"
        self.slow: dict[str, float] = json.loads(os.environ.get("DRILL_SLOW", "{}"))

    def __call__(self, event: str, **values: Any) -> None:
        row = {"event": event, "rank": int(self.rank), "pid": os.getpid(), "time": time.time(), **values}
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")

    def wait(self, event: str) -> None:
        end = time.monotonic() + self.slow.get(event, 0)
        while time.monotonic() < end:
            time.sleep(NAP)


def main() -> None:
    record = Record()
    record("begin")

    from unmask import commands
    from unmask.engine import train, training_state, world
    from unmask.engine.fault_points import FaultPoints, injected
    from unmask.engine.optimizer_state import optimizer_to_tensors
    from unmask.engine.sharding import Distributed
    from unmask.methods.mae import MAE
    from unmask.nn import masks
    from unmask.nn.whole import whole

    hidden: list[Any] = []
    drawn: list[None] = []
    plain_loss, plain_mask, plain_picture = Distributed.loss, masks.mask_from_noise, MAE.picture
    plain_restore, plain_save, plain_connect = train.restore, training_state.save, world._connect

    def connect() -> world.World:
        found = plain_connect()
        record("connected")
        return found

    def state(job: Any) -> str:
        weights, names = job.method.state_dict(), training_state.parameter_names(job.method)
        moments, _ = optimizer_to_tensors(job.optimizer, names)
        return digest(*(whole(value.detach()) for _, value in sorted((weights | moments).items())))

    def mask_from_noise(noise: Any, ratio: float) -> Any:
        hidden.append(plain_mask(noise, ratio))
        return hidden[-1]

    def loss(self: Distributed, batch: Any, clock: Any) -> Any:
        hidden.clear()
        found = plain_loss(self, batch, clock)
        rows = zip(
            clock.places(len(batch)).tolist(), batch.index.tolist(), batch.epoch.tolist(),
            [digest(one) for one in batch.images], [digest(one) for one in hidden[-1].hidden()], strict=True,
        )  # fmt: skip
        record("samples", step=clock.step + 1, samples=list(rows))
        return found

    def picture(self: MAE, *args: Any) -> Any:
        record("picture")
        drawn.append(None)
        if len(drawn) > record.slow.get("first", 0):
            record.wait("picture")
        return plain_picture(self, *args)

    def restore(job: Any) -> Any:
        found = plain_restore(job)
        if found is not None:
            record("restored", step=found.step, state=state(job))
        return found

    def save(job: Any, at: Any, *args: Any) -> None:
        record("saved", step=at.step, state=state(job))
        plain_save(job, at, *args)

    def before_step(job: Any, at: Any) -> None:
        record.wait("step")

    def after_step(job: Any, step: Any) -> Any:
        record("step", step=step.number)
        return step

    def before_write(path: Path) -> None:
        record("write", file=path.name)
        record.wait("write")

    points = FaultPoints(lambda run: record("training"), before_step, after_step, before_write)
    with (
        injected(points),
        patch.object(Distributed, "loss", loss),
        patch.object(masks, "mask_from_noise", mask_from_noise),
        patch.object(MAE, "picture", picture),
        patch.object(world, "_connect", connect),
        patch.object(train, "restore", restore),
        patch.object(train, "save", save),
    ):
        try:
            commands.main()
        except SystemExit as end:
            record("end", code=end.code or 0)
            raise


if __name__ == "__main__":
    main()
