"""`unmask prune`: free disk space in a run folder.

Features that probes have cached (they are computed again when needed) and all checkpoints except the newest intact ones
are removed. The newest weights, results, pictures and logs stay.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask.console import Console
from unmask.engine import checkpoint
from unmask.errors import UserError
from unmask.run import Run


@dataclass(frozen=True)
class Removable:
    """A folder inside a run that the run does not need.

    what: description of the folder for the message. bytes: size on disk.
    """

    path: str
    what: str
    bytes: int


def prune_run(path: Path, *, keep_checkpoints: int, dry_run: bool, console: Console) -> dict[str, Any]:
    """Remove the folders that a run does not need, or only list them, and return the list.

    keep_checkpoints: number of newest intact checkpoints to keep, at least 1. If the run is being trained, this raises
    RunInUse; if it has no intact checkpoint, this raises UserError. Nothing is removed in either case.
    """
    if keep_checkpoints < 1:
        raise UserError(f"got --keep-checkpoints {keep_checkpoints}; expected 1 or more: a run needs its weights")
    run = Run.open(path)
    with run.lock():
        found = [*_stored_features(run), *_old_checkpoints(run, keep_checkpoints)]
        for each in found if not dry_run else []:
            shutil.rmtree(each.path)
    total = sum(each.bytes for each in found)
    for each in found:
        console.print(
            f"{'would remove' if dry_run else 'removed'} {each.path}: {each.what}, {each.bytes / 1e6:,.1f} MB"
        )
    console.print(f"{total / 1e6:,.1f} MB {'would be freed' if dry_run else 'freed'} in {run.path}")
    return {"run": str(run.path), "bytes": total, "removed": not dry_run, "folders": [asdict(each) for each in found]}


def _stored_features(run: Run) -> list[Removable]:
    folders = [folder for folder in (run.path / "features", *run.path.glob("*/features")) if folder.is_dir()]
    return [Removable(str(folder), "features stored by probes", _bytes(folder)) for folder in folders]


def _old_checkpoints(run: Run, keep: int) -> list[Removable]:
    """Return all checkpoints except the `keep` newest intact ones.

    Checkpoints that were renamed to .corrupt are returned only if they are damaged; intact ones among them belong to
    another run.
    """
    sound: list[Path] = []
    for _, path in checkpoint.steps_on_disk(run):
        if len(sound) < keep:
            with suppress(checkpoint.Damaged):
                checkpoint.require_own(run, path, checkpoint.verify(path))
                sound.append(path)
    folders = sorted(folder for folder in run.checkpoints.glob("step-*") if folder.is_dir())
    if folders and not sound:
        raise UserError(f"{run.path} has no intact checkpoint; nothing was removed, so that no weights are lost")
    return [
        Removable(str(folder), "an older checkpoint" if folder.suffix == "" else "a damaged checkpoint", _bytes(folder))
        for folder in folders
        if folder not in sound and not _awaits_resume(folder) and not _is_foreign(folder)
    ]


def _is_foreign(folder: Path) -> bool:
    """Return whether a checkpoint was renamed to .corrupt because it belongs to another run, although it is intact."""
    if ".corrupt" not in folder.name:
        return False
    try:
        checkpoint.verify(folder)
    except checkpoint.Damaged:
        return False
    return True


def _awaits_resume(folder: Path) -> bool:
    """Return whether this folder is the only copy of its step, because a crash interrupted rewriting it."""
    return folder.suffix == checkpoint.REPLACED and not folder.with_suffix("").exists()


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
