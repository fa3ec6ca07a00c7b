"""The folder of one training run. Evaluations, reports and exports read only this folder.

    config.json  plan.json  provenance.json  status.json       plan.json is written last: without it there is no run
    metrics.jsonl            one line per logged step, each step once
    heartbeat.json           during training: the newest step and its time
    checkpoints/  pictures/  evals/*.json  report.html  quarantine.jsonl

This module imports the standard library only, so that reports load without torch. Files are written atomically: a
temporary file in the same folder is flushed to disk and then renamed. JSON files contain a digest and the id of their
run (`system/verified_json.py`), which are checked on every read; checkpoints contain the id and the digests of
config.json and plan.json. To change settings of a run, use `engine/edit_run.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unmask import run_summary
from unmask.errors import TrainingFailed, UserError
from unmask.run_status import RunStatus
from unmask.system import folder_lock, json_lines, verified_json
from unmask.system.atomic_files import replace_file
from unmask.system.verified_json import ChangedJson, Verified

CONFIG, PLAN, PROVENANCE, STATUS = "config.json", "plan.json", "provenance.json", "status.json"
DECIDING = (PROVENANCE, PLAN, CONFIG)
"""Files that determine the results. config.json is written last: if it has a digest, the others have a digest too."""
EDITS = "edits"
"""Key of provenance.json with the changes made after the run began, see `engine/edit_run.py`."""
REMEMBERED = (CONFIG, PLAN)
"""Files whose digests checkpoints store. Each of these files lists the digests of its earlier versions."""
SHORT = 16  # hexadecimal digits of each listed digest; few, because a time budget may change the plan a thousand times
UNFINISHED_FILES = re.compile(r"\.lock|config\.json|provenance\.json|quarantine\.jsonl|data\.arrays|\..*\.partial")
UNFINISHED_CHECKPOINTS = re.compile(r"step-00000000|\.tmp-.*|fixed-.*\.safetensors|LATEST|\..*\.partial")

held_here: list[Run] = []
"""Runs that this process has locked so far; the message after an interruption lists them."""


class RunError(UserError):
    """Raised if a folder is not a run, or a file in it cannot be read."""


class RunInUse(RunError):
    """Raised if another process is training in the folder of a run."""


class RunGone(TrainingFailed):
    """Raised if the folder was deleted, moved or replaced during the training. The folder is not created again."""


@dataclass(frozen=True)
class Identity:
    """The run that wrote a checkpoint: its id, and the SHA-256 of config.json and plan.json at that time."""

    run_id: str | None = None
    config: str | None = None
    plan: str | None = None

    @classmethod
    def of(cls, value: object) -> Identity:
        """Return the identity that a JSON value contains, or an empty identity if it contains none."""
        if not isinstance(value, dict):
            return cls()
        found = {key: value.get(key) for key in ("run_id", "config", "plan")}
        return cls(**{key: entry if isinstance(entry, str) else None for key, entry in found.items()})


class MetricsOffset(NamedTuple):
    """Position in metrics.jsonl up to which rows were read.

    file: inode number, which shows whether the file was replaced.
    """

    file: int
    byte: int


class MetricRows(list[dict[str, Any]]):
    """Logged rows.

    offset: position to pass to `Run.metrics` to read only newer rows. restarted: whether the rows that were read before
    must be discarded.
    """

    def __init__(self, rows: list[dict[str, Any]], offset: MetricsOffset, *, restarted: bool) -> None:
        super().__init__(rows)
        self.offset, self.restarted = offset, restarted


class Run:
    """A run folder. `Run.begin` creates a new run, and `Run.open` opens an existing run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.evals = self.path / "evals"
        self.report_file = self.path / "report.html"
        self.metrics_file = self.path / "metrics.jsonl"
        self.quarantine_file = self.path / "quarantine.jsonl"
        self.faults_file = self.path / "faults.jsonl"
        self.heartbeat_file = self.path / "heartbeat.json"
        self._new_id: str | None = None  # Id of the run, once it is created or read from config.json.
        self._digests: dict[str, str | None] = {}  # Digests of the files in REMEMBERED, as last read or written.
        self._lock: os.stat_result | None = None
        self._status: dict[str, Any] = {}  # the status, if it could not be written to status.json

    @classmethod
    def check_free(cls, path: str | Path) -> Run:
        """Return the run that `create` would create, without creating it.

        Raises RunError if `path` is not a free folder.
        """
        run = cls(path)
        if run.path.is_dir() and (not any(run.path.iterdir()) or run.is_unfinished()):
            return run
        if run.path.exists():
            what = "a file" if not run.path.is_dir() else "a folder that is not empty"
            resume = ""
            if (run.path / CONFIG).exists():
                resume = f", or continue the run: unmask resume {path}, or the command that began it with --resume auto"
            raise RunError(f"{path} is {what}; a new run needs a new or empty folder: choose another --out{resume}")
        return run

    @classmethod
    def create(cls, path: str | Path) -> Run:
        """Create the folders of a new run. Raises RunError.

        path: a new or empty folder, or a folder in which the creation of a run was interrupted.
        """
        run = cls.check_free(path)
        try:
            for folder in (run.path, run.checkpoints, run.pictures, run.evals):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"the run folder {path} cannot be created: {error.strerror}; choose another --out"
            ) from error
        run._new_id = uuid.uuid4().hex
        return run

    @classmethod
    @contextmanager
    def begin(
        cls,
        path: str | Path,
        files: Mapping[str, Mapping[str, Any]],
        *,
        fill: Callable[[Run], object] = lambda run: None,
        log: Callable[[str], object] = lambda text: None,
    ) -> Iterator[Run]:
        """Context manager that creates a run and locks it. If the creation fails, everything is removed. plan.json is
        written last: a folder without plan.json is unfinished, and a later `begin` may reuse it. files: contents of
        config.json, provenance.json and plan.json. fill: function that writes the other initial files. log: function
        that prints a message. Raises RunError.
        """
        existed = cls.check_free(path).path.exists()
        run = cls.create(path)
        with run.lock():
            cls.check_free(path)  # another process may have created a run here before this process got the lock
            try:
                if run._clear():
                    log(f"{path}: removed files of a run whose creation was interrupted")
                for name in REMEMBERED:
                    run._digests[name] = verified_json.dump(files[name], run.id)[1]
                for name in (CONFIG, PROVENANCE):
                    run.write(name, files[name])
                fill(run)
                run.write(PLAN, files[PLAN])
            except BaseException as error:
                with suppress(OSError):
                    run._clear()
                if not existed:
                    shutil.rmtree(run.path, ignore_errors=True)
                held_here.remove(run)
                if isinstance(error, OSError):
                    raise RunError(
                        f"the run {path} could not be created: {error.filename or path}: {error.strerror or error}; "
                        "its files were removed; choose another --out, or free space and try again"
                    ) from error
                raise
            yield run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Return an existing run. Raises RunError if the folder is not a run."""
        run = cls(path)
        if not run.path.is_dir():
            raise RunError(f"{path} is not a folder; expected the folder of a run, as `unmask pretrain` creates it")
        if run.is_unfinished():
            raise RunError(
                f"{path} is not a complete run: its creation was interrupted before the first step; repeat the same "
                f"command with --out {path}, or remove the folder: rm -r {path}"
            )
        if not (run.path / CONFIG).is_file():
            inside = sorted(entry.parent.name for entry in run.path.glob(f"*/{CONFIG}"))[:3]
            hint = f"; did you mean {' or '.join(str(run.path / name) for name in inside)}?" if inside else ""
            raise RunError(f"{path} is not a run: it has no config.json{hint}")
        if not (run.path / PLAN).exists() and any(run.path.glob("*.safetensors")):
            raise RunError(
                f"{path} is not a run, but a folder of weights for another library; convert it to a run first: unmask "
                f"import {path} --out RUN"
            )
        return run

    def __repr__(self) -> str:
        return run_summary.as_text(self)

    def _repr_html_(self) -> str:
        return run_summary.as_html(self)  # called by notebooks

    def is_unfinished(self) -> bool:
        """Return whether the folder contains only files that `begin` writes before plan.json."""
        try:
            inside = {entry.name: entry for entry in self.path.iterdir()}
            folders = {name: list(inside.pop(name).iterdir()) for name in ("evals", "pictures") if name in inside}
            checkpoints = list(inside.pop("checkpoints").iterdir()) if "checkpoints" in inside else []
        except OSError:
            return False
        if not inside or any(folders.values()):
            return False
        if not all(UNFINISHED_FILES.fullmatch(name) for name in inside):
            return False
        if CONFIG not in inside:
            return not checkpoints and not inside.keys() & {PROVENANCE, "quarantine.jsonl"}
        try:
            config = json.loads(inside[CONFIG].read_bytes())
        except (OSError, ValueError):
            return False
        ours = isinstance(config, dict) and {"recipe", "method", "data", "train"} <= config.keys()
        return ours and all(UNFINISHED_CHECKPOINTS.fullmatch(entry.name) for entry in checkpoints)

    def _clear(self) -> bool:
        """Remove files of an interrupted creation; return whether there were any. The caller holds the lock."""
        found = False
        for entry in [*self.checkpoints.iterdir(), *self.path.iterdir()]:
            if entry.name in (folder_lock.FILE, "checkpoints", "pictures", "evals"):
                continue
            found = True
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        return found

    @property
    def id(self) -> str | None:
        """The random id of the run, or None for runs of earlier versions. Raises RunError."""
        if self._new_id is None and (self.path / CONFIG).exists():
            self._new_id = self.verified(CONFIG).run_id
        return self._new_id

    def identity(self) -> Identity:
        """Return the identity to store in checkpoints of this run. Raises RunError."""
        for name in REMEMBERED:
            if name not in self._digests and (self.path / name).exists():
                self.verified(name)
        return Identity(self.id, self._digests.get(CONFIG), self._digests.get(PLAN))

    def why_foreign(self, found: Identity) -> str:
        """Return why a checkpoint with this identity does not belong to this run, or "" if it belongs to it.

        Raises RunError.
        """
        if found.run_id != self.id:
            return f"it belongs to {_run_name(found.run_id)}, this is {_run_name(self.id)}"
        for name, digest in ((CONFIG, found.config), (PLAN, found.plan)):
            if digest is None or not (self.path / name).exists():
                continue
            now = self.verified(name)
            if now.sha256 is not None and digest != now.sha256 and digest[:SHORT] not in now.earlier:
                return f"it was written with a different {name}"
        return ""

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `name` (for example "evals/probe.json") as JSON with its digest, atomically."""
        self.require_present()
        path, earlier = self.path / name, tuple[str, ...]()
        if name in REMEMBERED and path.exists():
            before = self.verified(name)
            earlier = before.earlier + (() if before.sha256 is None else (before.sha256[:SHORT],))
        content, digest = verified_json.dump(value, self.id, earlier)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, content)
        if name in REMEMBERED:
            self._digests[name] = digest

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Write `name` by a function of its path."""
        write(self.path / name)

    def read(self, name: str) -> dict[str, Any]:
        """Return the contents of a JSON file. Raises RunError if the file is missing, modified or not a JSON object."""
        return self.verified(name).value

    def read_if_present(self, name: str) -> dict[str, Any]:
        """Return the contents of a JSON file, or {} if there is no such file. Raises RunError like `read`."""
        return self.read(name) if (self.path / name).exists() else {}

    def verified(self, name: str) -> Verified:
        """Return a JSON file of the run with its digest, after checking it. Raises RunError like `read`."""
        path = self.path / name
        try:
            found = verified_json.load(path.read_bytes())
        except FileNotFoundError:
            raise RunError(f"{path} is missing, so this run is incomplete; {_remedy(name, path)}") from None
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}; {_remedy(name, path)}") from None
        except ChangedJson as fault:
            raise RunError(f"{path} {fault}; {_remedy(name, path)}") from None
        if found.sha256 is None and self._must_have_digest(name):
            raise RunError(
                f"{path} has no digest, but other files of this run have one: the file was edited by hand, or belongs "
                f"to another run; {_remedy(name, path)}"
            )
        if name != CONFIG and found.sha256 is not None and found.run_id != self.id:
            raise RunError(
                f"{path} belongs to {_run_name(found.run_id)}, this is {_run_name(self.id)}; {_remedy(name, path)}"
            )
        if name in REMEMBERED:
            self._digests[name] = found.sha256
        return found

    def _must_have_digest(self, name: str) -> bool:
        """Return whether other files of the run show that this file was written with a digest."""
        if name != CONFIG:
            if self.id is not None:
                return True
            return name in DECIDING and (self.path / CONFIG).exists() and self.verified(CONFIG).sha256 is not None
        manifests = list(self.checkpoints.glob("step-*/MANIFEST.json"))
        for path in (self.path / PLAN, self.path / PROVENANCE, *manifests):
            with suppress(OSError):
                if re.search(rb'"run_id": *"', path.read_bytes()):
                    return True
        return False

    def add_digests(self) -> None:
        """Add digests to the DECIDING files of a run of an earlier version, so that later changes are detected."""
        for name in DECIDING:
            if (self.path / name).exists() and (found := self.verified(name)).sha256 is None:
                self.write(name, found.value)

    def require_present(self) -> None:
        """Raise RunGone if the folder is missing or was replaced by another one."""
        there = self.path.is_dir()
        if there and self._lock is not None:
            with suppress(OSError):
                now = os.stat(self.path / folder_lock.FILE)
                there = (now.st_dev, now.st_ino) == (self._lock.st_dev, self._lock.st_ino)
        if not there:
            raise RunGone(
                f"the run folder {self.path} was deleted, moved or replaced during the training; move it back and run "
                f"`unmask resume {self.path}`, or start a new run"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.require_present()
        json_lines.append(self.metrics_file, row)

    def metrics(self, since: MetricsOffset | None = None) -> MetricRows:
        """Return the logged rows, without a last line that a crash truncated. Raises RunError. since: `offset` of the
        rows that were read before, to read only newer rows. If rows were removed since then, for example by a resume or
        a rollback, all rows are returned and `restarted` is True.
        """
        try:
            with self.metrics_file.open("rb") as file:
                about = os.fstat(file.fileno())
                known = since is not None and since.file == about.st_ino and since.byte <= about.st_size
                start = since.byte if since is not None and known else 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return MetricRows([], MetricsOffset(0, 0), restarted=since is not None and since.byte > 0)
        except OSError as error:
            raise _unreadable(self.metrics_file, error) from None
        complete = len(content) if json_lines.parse(content[(end := content.rfind(b"\n") + 1) :]) else end
        restarted = since is not None and since.byte > 0 and not known
        return MetricRows(json_lines.parse(content), MetricsOffset(about.st_ino, start + complete), restarted=restarted)

    def truncate_metrics(self, step: int) -> None:
        """Remove the rows after `step`, so that after a resume each step is logged exactly once."""
        if self.metrics_file.exists():
            rows = [row for row in self.metrics() if row.get("step", 0) <= step]
            replace_file(self.metrics_file, b"".join(json_lines.to_line(row) for row in rows))

    def sync_metrics(self) -> None:
        """Flush metrics.jsonl to disk.

        This is called before each checkpoint, so that a power cut loses no earlier row.
        """
        if self.metrics_file.exists():
            with self.metrics_file.open("r+b") as file:
                os.fsync(file.fileno())

    def set_status(
        self,
        state: str,
        step: int,
        *,
        total: int | None = None,
        seconds: float | None = None,
        error: str | None = None,
    ) -> None:
        """Record the state ("running", "stopped", "finished" or "failed") and this process in status.json.

        total: number of steps in all. seconds: training time. error: why the run failed. Raises OSError, RunError or
        RunGone if the file cannot be written; Even then, `status` returns the new state.
        """
        optional = {"total": total, "seconds": seconds, "error": error}
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        self._status = {"state": state, "step": step, "time": time.time(), **optional, **process}
        self._status = {key: value for key, value in self._status.items() if value is not None}
        if state != "running":
            with suppress(OSError):
                self.heartbeat_file.unlink(missing_ok=True)
        self.write(STATUS, self._status)
        self._status = {}

    def status(self) -> RunStatus:
        """Return the last status, even if it could not be written, or an empty status if the file is missing or
        damaged.

        `status().health()` distinguishes slow runs from dead runs.
        """
        recorded, heartbeat = self._recorded_status(), {}
        if recorded.get("state") == "running":
            with suppress(OSError, ValueError):
                heartbeat = json.loads(self.heartbeat_file.read_bytes())
        locked = recorded.get("state") == "running" and folder_lock.is_held(self.path)
        return RunStatus.of(recorded, heartbeat if isinstance(heartbeat, dict) else {}, locked=locked)

    def saved_step(self) -> int:
        """Return the step in status.json, which has a checkpoint. Training may have continued since, see `status`."""
        return RunStatus.of(self._recorded_status(), {}, locked=False).step

    def _recorded_status(self) -> dict[str, Any]:
        if not self._status:
            with suppress(RunError):
                return self.read(STATUS)
        return self._status

    def write_heartbeat(self, step: int) -> None:
        """Record that `step` steps are done now. The file is not flushed to disk. Raises OSError, RunGone."""
        self.require_present()
        partial = self.path / f".{self.heartbeat_file.name}.partial"
        partial.write_text(json.dumps({"time": time.time(), "step": step}))
        os.replace(partial, self.heartbeat_file)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and the result of a supervised run has been written."""
        return self.status().state == "finished"

    def add_quarantine(self, row: dict[str, Any]) -> None:
        """Record a file that could not be read: {"name", "code", "detail", ...}."""
        json_lines.append(self.quarantine_file, row)

    def add_fault(self, row: dict[str, Any]) -> None:
        """Record a skipped step and its images in faults.jsonl.

        A rollback removes skipped steps from metrics.jsonl only.
        """
        json_lines.append(self.faults_file, row)

    def quarantine(self) -> list[dict[str, Any]]:
        return _rows(self.quarantine_file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Context manager that locks the folder for this process. The system releases the lock if the process dies.

        Raises RunInUse or RunError.
        """
        with ExitStack() as stack:
            try:
                handle = stack.enter_context(folder_lock.locked(self.path))
            except folder_lock.Locked as error:
                raise RunInUse(f"{self.path} {error}") from None
            except OSError as error:
                raise RunError(
                    f"{self.path} cannot be written to: {error.strerror}; make it writable, or choose another --out"
                ) from error
            self._lock = os.fstat(handle)
            held_here.append(self)
            yield


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, or [] if there is no such file. Raises RunError."""
    try:
        return json_lines.parse(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be read: {error.strerror}; make it readable, or remove it")


def _run_name(run_id: str | None) -> str:
    return "a run without an id (of an earlier version)" if run_id is None else f"run {run_id[:8]}"


def _remedy(name: str, path: Path) -> str:
    """Return how the user can replace or restore an unusable file."""
    if name == STATUS:
        return f"delete it and run: unmask resume {path.parent}"
    if name.startswith("evals/"):
        return "delete it and measure again"
    if name in DECIDING:
        return "restore it from a backup, or start a new run; to change settings, use `unmask set`, not an editor"
    return "restore it from a backup, or delete it"
