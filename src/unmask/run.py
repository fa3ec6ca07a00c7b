"""A Run: the folder that a training run is. Everything after training reads this folder, never the trainer's memory.

    config.json  plan.json  provenance.json  status.json
    metrics.jsonl            one line per logged step, each step once
    checkpoints/  pictures/  evals/*.json  report.html  quarantine.jsonl

Standard library only, so that the report and the web page open a Run without loading torch. Files appear whole or not
at all: written beside their final name, flushed to disk, then renamed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any

from unmask import run_summary
from unmask.errors import UserError, naming

try:
    import fcntl
except ImportError:  # Windows: two trainers in one folder are then not noticed
    fcntl = None  # type: ignore[assignment]


class RunError(UserError):
    """A folder that is not a Run, or a file in it that cannot be read; the message says what to do."""


class RunInUse(RunError):
    """Another process trains in this folder."""


class Run:
    """An existing run folder; make one with `Run.create`, open one with `Run.open`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.evals = self.path / "evals"
        self.report_file = self.path / "report.html"
        self.metrics_file = self.path / "metrics.jsonl"
        self.quarantine_file = self.path / "quarantine.jsonl"
        self.faults_file = self.path / "faults.jsonl"

    @classmethod
    def check_free(cls, path: str | Path) -> Run:
        """What `create` would make, with nothing made yet. Raises RunError when the folder is taken."""
        run = cls(path)
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            what = "a file" if not run.path.is_dir() else "a folder that is not empty"
            go_on = f", or go on with it: unmask resume {path}" if (run.path / "config.json").exists() else ""
            raise RunError(f"{path} is {what}; a new run needs a new or empty folder: choose another --out{go_on}")
        return run

    @classmethod
    def create(cls, path: str | Path) -> Run:
        """A new run in a folder that does not exist yet or is empty. Raises RunError otherwise."""
        run = cls.check_free(path)
        try:
            for folder in (run.path, run.checkpoints, run.pictures, run.evals):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run folder {path} cannot be made: {error.strerror}; choose another --out") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises RunError when the folder is not one."""
        run = cls(path)
        if not run.path.is_dir():
            raise RunError(f"{path} is not a folder; a run is the folder that `unmask pretrain` made")
        if not (run.path / "config.json").is_file():
            inside = sorted(entry.parent.name for entry in run.path.glob("*/config.json"))[:3]
            hint = f"; did you mean {' or '.join(str(run.path / name) for name in inside)}?" if inside else ""
            raise RunError(f"{path} is not a run: it has no config.json{hint}")
        if not (run.path / "plan.json").exists() and any(run.path.glob("*.safetensors")):
            raise RunError(
                f"{path} is not a run, but a folder of weights for another library; make a run of it first: unmask "
                f"import {path} --out RUN"
            )
        return run

    def __repr__(self) -> str:
        return run_summary.as_text(self)

    def _repr_html_(self) -> str:
        return run_summary.as_html(self)  # notebooks ask for it

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write `name` (for example "evals/probe.json") as JSON, whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(value, indent=2).encode("ascii") + b"\n")

    def read(self, name: str) -> dict[str, Any]:
        """Raises RunError when the file is missing or is not the JSON object it should be."""
        path = self.path / name
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunError(f"{path} is missing; this run is not complete") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}; restore the file, or start a new run") from None
        if not isinstance(value, dict):
            raise RunError(f"{path} holds a {type(value).__name__}, a JSON object was expected")
        return value

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        _append(self.metrics_file, row)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows; a line torn by a crash is left out."""
        return _read_lines(self.metrics_file)

    def truncate_metrics(self, step: int) -> None:
        """Keep the rows up to this step, so that after a resume each step stands there exactly once."""
        if self.metrics_file.exists():
            rows = [row for row in self.metrics() if row.get("step", 0) <= step]
            replace_file(self.metrics_file, b"".join(_line(row) for row in rows))

    def sync_metrics(self) -> None:
        """Flush metrics.jsonl to disk: before a checkpoint, so that a power cut loses no row from before it."""
        if self.metrics_file.exists():
            with self.metrics_file.open("r+b") as file:
                os.fsync(file.fileno())

    def set_status(self, state: str, step: int, **more: Any) -> None:
        """state: "running", "stopped", "finished" or "failed"."""
        self.write("status.json", {"state": state, "step": step, "time": time.time(), **more})

    def add_quarantine(self, row: dict[str, Any]) -> None:
        """Note a file that could not be read: {"name", "code", "detail", ...}."""
        _append(self.quarantine_file, row)

    def add_fault(self, row: dict[str, Any]) -> None:
        """Note a skipped step and its images, for good: a rollback takes it out of metrics.jsonl, not out of here."""
        _append(self.faults_file, row)

    def quarantine(self) -> list[dict[str, Any]]:
        return _read_lines(self.quarantine_file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one trainer. The system drops the lock when its holder dies, however it dies."""
        try:
            opened = (self.path / ".lock").open("a+")
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written to: {error.strerror}; make it writable, or choose another --out"
            ) from error
        with opened as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise RunInUse(
                        f"{self.path} is in use by process {holder}; wait for it, stop it, or choose another --out"
                    ) from None
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            yield


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode("ascii") + b"\n"  # ASCII: file names may hold bytes that are no text


def _append(path: Path, row: dict[str, Any]) -> None:
    # A line torn by a crash must not swallow the next one.
    with naming(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(_line(row))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def free_path(path: Path) -> Path:
    """`path`, or with the first number from 2 on at its end that is not taken."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """A file to write and read that becomes `path` when all is well, and is not there otherwise.

    It lies beside its name, is flushed to disk and renamed; the folder entry is flushed too.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path), partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
