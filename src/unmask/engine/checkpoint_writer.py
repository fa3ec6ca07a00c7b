"""Save checkpoints while training continues: a snapshot of the state is taken on the step, and a thread writes it.

A snapshot costs the time and the host memory of one copy of what this process would write: with AdamW in float32, 12
bytes per parameter for the writer of a dense checkpoint (weights and two moments), and this process's share of them for
shards. The memory is free again once the checkpoint is complete. For a time the largest file of the checkpoint is in
memory once more: a shard as the bytes that are written, another file when it is read again and verified.

The thread uses no library function that copies much memory without letting other threads run, because training would
wait for it (except for shards, whose bytes safetensors makes).

At most one checkpoint is being written; a save waits for the one before. Several processes agree on each outcome over a
process group of their own, because the thread and the training would otherwise mix their messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unmask.engine import checkpoint
from unmask.engine.checkpoint import CheckpointFull, CheckpointRefused, Format
from unmask.engine.world import World
from unmask.nn.whole import whole
from unmask.run import Run, RunGone


@dataclass(frozen=True)
class Snapshot:
    """The state of a training at one step, in host memory. Later changes of the training do not change it."""

    step: int
    model: Mapping[str, Tensor]
    optim: Mapping[str, Tensor]
    state: Mapping[str, Any]


class CheckpointWriter:
    """Writes snapshots of a run in a thread, in all processes of `world` together.

    seconds: how long the last checkpoint took.
    """

    def __init__(self, run: Run, world: World, kind: Format, keep: int) -> None:
        self.run, self.world, self.keep = run, world, keep
        self.kind: Format = kind
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._reason: str | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun whose outcome is not known yet."""
        return self._thread is not None

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in host memory of what this process writes; all processes must call this.

        For shards these are the parts that this process holds, as DTensors; for a dense checkpoint the whole tensors,
        in the writer only.
        """
        if self.kind == "dcp":
            return {name: _copied(value) for name, value in tensors.items()}
        found = {}
        for name, value in tensors.items():
            full = whole(value.detach())  # of a DTensor, all processes send their parts
            if self.world.is_writer:
                found[name] = _copied(full)
        return found

    def start(
        self,
        snapshot: Snapshot,
        *,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin to write a snapshot. `finish` must have returned the outcome of the one before.

        before, after: called in the thread, before the checkpoint is written and after it is complete.
        """
        assert self._thread is None, "at most one checkpoint is being written"
        run = copy_context().run  # the fault points of tests are in the context
        arguments = (self._write, snapshot, before, after)
        self._thread = threading.Thread(target=run, args=arguments, name="unmask checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the checkpoint that was begun is written, at most `seconds` (None: without limit)."""
        if self._thread is not None:
            self._thread.join(seconds)

    def finish(self) -> str | None:
        """Wait until the checkpoint that was begun is written; return None, or why it was not written.

        Reasons are a full disk or non-finite weights. Other errors of the thread are raised here.
        """
        self.wait()
        reason, error = self._reason, self._error
        self._thread = self._reason = self._error = None
        if error is not None:
            raise error
        return reason

    def _write(self, snapshot: Snapshot, before: Callable[[], object], after: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            before()
            self._save(snapshot)
            after()
        except (CheckpointFull, CheckpointRefused, RunGone) as error:
            self._reason = str(error)
        except BaseException as error:  # a thread must not end without a report
            self._error = error
        self.seconds = time.perf_counter() - began

    def _save(self, at: Snapshot) -> None:
        checkpoint.save(
            self.run, at.step, at.model, at.optim, at.state, keep=self.keep, world=self.world, kind=self.kind
        )


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
