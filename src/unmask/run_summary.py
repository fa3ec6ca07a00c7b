"""A summary of a run as one typed record, for `unmask ls` and for the display of a `Run` in Python or a notebook.

The module only reads the run folder and does not import torch. Fields from missing or damaged files are None, because a
list of runs shows damaged runs too.
"""

from __future__ import annotations

import base64
import html
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unmask.errors import UserError
from unmask.run_status import RunStatus
from unmask.system import folder_lock


class RunFolder(Protocol):
    """The members of `Run` that this module uses.

    The class itself cannot be imported, because `run.py` imports this module.
    """

    path: Path
    evals: Path
    pictures: Path

    def read(self, name: str) -> dict[str, Any]: ...

    def metrics(self) -> list[dict[str, Any]]: ...

    def status(self) -> RunStatus: ...


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    size: (H, W) of the images in pixels. loss: loss of the last logged step. probe: the newest result, in words. bytes:
    size on disk. changed: time at which a file of the run last changed, in seconds since 1970.
    """

    path: str
    state: str
    recipe: str
    method: str
    step: int | None
    steps: int | None
    size: tuple[int, int] | None
    images: int | None
    loss: float | None
    probe: str
    bytes: int
    changed: float

    @property
    def progress(self) -> str:
        """Number of steps done and in all, such as '250/1000', or '' if there is no plan."""
        return f"{self.step or 0}/{self.steps}" if self.steps is not None else ""


def summarise(run: RunFolder) -> RunSummary:
    """Summarise a run from its folder. Missing or damaged files raise no error."""
    config, plan = (_read(run, name) for name in ("config.json", "plan.json"))
    status = run.status()
    size = (plan.get("images") or {}).get("size") or (config.get("data") or {}).get("size")
    losses = [row["loss"] for row in _metrics(run) if isinstance(row.get("loss"), float)]
    files = list(_files(run.path))
    return RunSummary(
        path=str(run.path),
        state=status.shown_state or ("imported" if (run.path / "checkpoints").is_dir() else "damaged"),
        recipe=str(config.get("recipe") or ""),
        method=str((config.get("method") or {}).get("name") or ""),
        step=status.step if status.state else None,
        steps=plan.get("steps"),
        size=(int(size[0]), int(size[1])) if size else None,
        images=plan.get("num_images"),
        loss=losses[-1] if losses else None,
        probe=_newest_result(run),
        bytes=sum(file.st_size for file in files),
        changed=max((file.st_mtime for file in files), default=0.0),
    )


def _files(folder: Path) -> Iterator[os.stat_result]:
    """Yield the status of each file below a folder. Files that are deleted meanwhile are skipped."""
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found = os.stat(os.path.join(inside, name))
                if stat.S_ISREG(found.st_mode) and name != folder_lock.FILE:
                    yield found


def as_html(run: RunFolder) -> str:
    """Return a small HTML table of the run with its newest picture, for notebooks. The HTML needs no network."""
    found = summarise(run)
    size = "" if found.size is None else f"{found.size[0]} x {found.size[1]} pixels"
    rows = {
        "run": found.path, "state": found.state, "recipe": found.recipe, "step": found.progress,
        "images": "" if found.images is None else f"{found.images:,} of {size}",
        "loss": "" if found.loss is None else f"{found.loss:.4f}", "probe": found.probe,
    }  # fmt: skip
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items() if text)
    pictures = sorted(run.pictures.glob("step-*.png"))
    if not pictures:
        return f"<table>{cells}</table>"
    data = base64.b64encode(pictures[-1].read_bytes()).decode("ascii")
    return f'<table>{cells}</table><img alt="{pictures[-1].name}" src="data:image/png;base64,{data}">'


def as_text(run: RunFolder) -> str:
    """Return a line such as `Run('runs/a', finished, step 250/250, mae_nano, loss 0.4321)`."""
    found = summarise(run)
    loss = "" if found.loss is None else f"loss {found.loss:.4f}"
    parts = [found.state, f"step {found.progress}" if found.progress else "", found.recipe, loss, found.probe]
    return f"Run({', '.join([repr(found.path), *filter(None, parts)])})"


def _read(run: RunFolder, name: str) -> dict[str, Any]:
    try:
        return run.read(name)
    except UserError:
        return {}


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    try:
        return run.metrics()
    except UserError:
        return []


def _newest_result(run: RunFolder) -> str:
    """Return the newest score of the run's features, such as 'linear 55.8 % on digits', or "" without a score."""
    from unmask.results import ACCURACY, FinetuneResult, ProbeResult, read_results  # pydantic is slow to import

    records = read_results(run).records
    changed: dict[str, float] = {}
    for name in records:
        with suppress(OSError):
            changed[name] = (run.evals / f"{name}.json").stat().st_mtime
    for name in sorted(changed, key=lambda name: changed[name], reverse=True):
        record = records[name]
        if isinstance(record, FinetuneResult):
            metric = "" if record.metric == ACCURACY else f" {record.metric}"
            return f"fine-tuned {100 * record.value:.1f} %{metric}"
        if isinstance(record, ProbeResult) and record.metric == ACCURACY and (own := record.row()) is not None:
            return f"{record.kind} {100 * own.value:.1f} % on {Path(record.data.name).name}"
    return ""
