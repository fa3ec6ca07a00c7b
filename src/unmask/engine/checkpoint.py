"""Read and write checkpoints. After a crash at any moment an intact checkpoint remains, and damaged checkpoints are
never used.

    checkpoints/.tmp-00001234-<id>/    written here, never read
    checkpoints/step-00001234/         created by renaming that folder
        model.safetensors  optim.safetensors  state.json  MANIFEST.json
        dcp/shard-....safetensors in place of the first two, if several processes wrote the checkpoint
    checkpoints/step-00001234.old/     exists briefly while the same step is written again
    checkpoints/LATEST name of the newest checkpoint, for users; never read
    checkpoints/fixed-<digest>.safetensors   tensors that never change after step 0, stored once for all steps

A save writes the files and flushes each of them to disk, writes MANIFEST.json with their sizes and SHA-256, renames the
folder and flushes its parent, writes LATEST, and then removes old checkpoints. state.json and MANIFEST.json contain the
id of the run and the digests of its config.json and plan.json, so that the checkpoint of another run is rejected even
if its shapes match. Only safetensors files are loaded. A pickle in place of a safetensors file is rejected and never
opened.

Other modules describe parts of this: `checkpoint_manifest.py` the manifest and its checks, `checkpoint_formats.py` the
two formats of the tensors, `fixed_tensors.py` the tensors that never change, `checkpoint_writer.py` the thread that
saves while training continues.

Where several processes write or read together, they agree on each outcome: either all of them have the checkpoint, or
all raise the same error.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from unmask.console import escape_controls
from unmask.engine.checkpoint_formats import (
    MODEL,
    OPTIM,
    SHARDS,
    CheckpointError,
    CheckpointFull,
    Damaged,
    Digested,
    Entry,
    Tensors,
    entry,
    own_part,
    safetensors_pieces,
    write_shards,
)
from unmask.engine.checkpoint_manifest import (
    MANIFEST,
    STATE,
    listed_files,
    manifest_content,
    require_own,
    verified_file,
    verify,
)
from unmask.engine.choose_parallel import size
from unmask.engine.fault_points import fault_points
from unmask.engine.fixed_tensors import FIXED, load_fixed
from unmask.engine.world import ALONE, World
from unmask.errors import UserError
from unmask.run import Run
from unmask.system.atomic_files import replace_file, sync_folder

LATEST, REPLACED = "LATEST", ".old"
STEP_FOLDER = re.compile(r"step-(\d{8,})$")

Format = Literal["dense", "dcp"]


class CheckpointRefused(CheckpointError):
    """Raised if a checkpoint is not written because weights are not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests have been verified, with its tensors on the CPU."""

    step: int
    path: Path
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]


def save(
    run: Run,
    step: int,
    model: Mapping[str, Tensor],
    optim: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    world: World = ALONE,
    kind: Format = "dense",
) -> Path:
    """Write checkpoint `step` and return its folder; remove all but the newest `keep` (at least 2) intact checkpoints.

    All processes of `world` must call this. With kind "dense" the writer writes its tensors, and the others need none;
    with "dcp" each process writes the parts that it holds. In all processes alike, raises CheckpointRefused for weights
    that are not finite, CheckpointFull if the checkpoint cannot be written, and RunGone if the run folder is missing.
    After such an error, older checkpoints are unchanged.
    """
    assert keep >= 2, "keep at least two, because the newest may be damaged"
    _refuse_non_finite(step, model, world)
    folder = world.from_writer(lambda: _begin(run, step))
    files, failure = dict[str, Any](), None
    try:
        if kind == "dcp":
            (folder / SHARDS).mkdir(exist_ok=True)  # here, because torch hides an error of the disk
            files = write_shards(folder / SHARDS, model, optim, world.group)
        elif world.is_writer:
            files[MODEL] = _write(folder / MODEL, *safetensors_pieces(model))
            files[OPTIM] = _write(folder / OPTIM, *safetensors_pieces(optim))
    except OSError as error:
        failure = error
    reports = world.gather((files, _why(failure), socket.gethostname()))
    for rank, (_, why, host) in enumerate(reports):
        if why is not None:
            world.from_writer(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise _full(run, step, why, "" if world.alone else f" by rank {rank} on {host}") from failure
    written = {name: made for files, _, _ in reports for name, made in files.items()}
    return world.from_writer(lambda: _complete(run, step, folder, written, state, keep))


def _refuse_non_finite(step: int, model: Mapping[str, Tensor], world: World) -> None:
    parts = {name: own_part(value) for name, value in model.items()}
    mine = [name for name, part in parts.items() if part.is_floating_point() and not part.isfinite().all()]
    if poisoned := list(dict.fromkeys(name for names in world.gather(mine) for name in names)):
        raise CheckpointRefused(
            f"checkpoint of step {step} not written: {len(poisoned)} tensors contain non-finite numbers, first "
            f"{poisoned[0]}; the previous checkpoint is kept"
        )


def _begin(run: Run, step: int) -> Path:
    """Return a new folder for the files of a checkpoint."""
    run.require_present()
    folder = run.checkpoints / f".tmp-{step:08d}-{uuid.uuid4().hex[:8]}"
    try:
        run.checkpoints.mkdir(exist_ok=True)
        _clear_leftovers(run)
        folder.mkdir()
    except OSError as error:
        raise _full(run, step, _why(error)) from error
    return folder


def _complete(run: Run, step: int, folder: Path, files: Mapping[str, Any], state: Mapping[str, Any], keep: int) -> Path:
    """Write state.json and the manifest beside the tensors, and make the folder the checkpoint of `step`."""
    final, whose = run.checkpoints / f"step-{step:08d}", run.identity()
    try:
        content = json.dumps({**state, "run": asdict(whose)}).encode()
        _write(folder / STATE, content)
        fixed = sorted(file.name for file in run.checkpoints.glob(FIXED))
        entries = {**files, STATE: entry(content)}
        _write(folder / MANIFEST, manifest_content(step, whose, fixed, entries))
        if (folder / SHARDS).exists():
            sync_folder(folder / SHARDS)
        sync_folder(folder)
        if final.exists():  # a rollback saves the same step again; `_clear_leftovers` handles crashes
            os.rename(final, final.with_name(final.name + REPLACED))
        os.rename(folder, final)
        sync_folder(run.checkpoints)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _full(run, step, _why(error)) from error
    with suppress(OSError):  # LATEST is optional
        replace_file(run.checkpoints / LATEST, final.name.encode() + b"\n")
    with suppress(OSError):
        _KNOWN[final] = _files_of(final)
    _prune(run, keep)
    return final


def _why(error: OSError | None) -> str | None:
    if error is None:
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "the disk is full" if full else str(error.strerror or error)


def _full(run: Run, step: int, why: str | None, by: str = "") -> CheckpointFull:
    return CheckpointFull(
        f"checkpoint of step {step} could not be written to {run.checkpoints}{by}: {why}; training continues, and "
        "older checkpoints are unchanged"
    )


def _write(path: Path, *pieces: Any) -> Entry:
    """Write bytes-like pieces and flush the file to disk; return its entry in the manifest."""
    fault_points().before_write(path)
    with path.open("wb") as file:
        stream = Digested(file)
        for piece in pieces:
            stream.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return stream.entry()


def _clear_leftovers(run: Run) -> None:
    """Remove or restore files of an interrupted save.

    The caller must hold the run's lock, so that no other process writes.
    """
    for leftover in run.checkpoints.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in run.checkpoints.glob(f".{LATEST}.*.partial"):
        leftover.unlink(missing_ok=True)
    for replaced in run.checkpoints.glob(f"step-*{REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, final)


def _prune(run: Run, keep: int) -> None:
    """Remove checkpoints that are older than the newest `keep` intact ones."""
    for replaced in run.checkpoints.glob(f"step-*{REPLACED}"):
        shutil.rmtree(replaced, ignore_errors=True)
    good = 0
    for _, path in steps_on_disk(run):
        if good >= keep:
            shutil.rmtree(path, ignore_errors=True)
            _KNOWN.pop(path, None)
        elif _is_intact(run, path):
            good += 1


def _is_intact(run: Run, path: Path) -> bool:
    """Return whether a checkpoint is intact and belongs to the run.

    Files that this process has written or verified are not read again unless their size or time has changed.
    """
    try:
        known = _KNOWN.get(path) == _files_of(path)
        require_own(run, path, {STATE: (path / STATE).read_bytes()} if known else verify(path))
        _KNOWN[path] = _files_of(path)
    except (OSError, UserError):
        return False
    return True


_KNOWN: dict[Path, dict[str, tuple[int, int]]] = {}
"""What `_files_of` returned for the checkpoints that this process has written or verified."""


def _files_of(path: Path) -> dict[str, tuple[int, int]]:
    """Return {name: (size, time of the last change in ns)} of the files of a checkpoint."""
    found = {str(file.relative_to(path)): file.stat() for file in path.rglob("*") if file.is_file()}
    return {name: (about.st_size, about.st_mtime_ns) for name, about in found.items()}


def steps_on_disk(run: Run) -> list[tuple[int, Path]]:
    """Return (step, folder) of all checkpoints, newest first, as their names state, without verifying the files."""
    found = [
        (int(match[1]), path) for path in run.checkpoints.glob("step-*") if (match := STEP_FOLDER.match(path.name))
    ]
    return sorted(found, reverse=True)


def _read(run: Run, path: Path, *, with_optim: bool = True) -> Checkpoint:
    tensors = Tensors(path, with_optim=with_optim)
    contents = verify(path, tensors.add)
    require_own(run, path, contents)
    return Checkpoint(
        step=step_of(path),
        path=path,
        model=tensors.model() | load_fixed(path.parent),
        optim=tensors.optim(),
        state=_state(contents),
    )


def _state(contents: Mapping[str, bytes]) -> dict[str, Any]:
    return {key: value for key, value in json.loads(contents[STATE]).items() if key != "run"}


def load_latest(run: Run, *, log: Callable[[str], object] = print) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if no checkpoint was ever written.

    Damaged checkpoints are renamed to step-N.corrupt and reported. Raises CheckpointError if all are damaged.
    """
    _clear_leftovers(run)
    candidates = steps_on_disk(run)
    for _, path in candidates:
        try:
            return _read(run, path)
        except Damaged as fault:
            _report_and_set_aside(path, fault, log)
    damaged = sorted(path.name for path in run.checkpoints.glob("step-*.corrupt*"))
    if candidates or damaged:
        raise CheckpointError(
            f"no checkpoint of {run.path} can be used: all are damaged or belong to another run "
            f"({', '.join(damaged)}); restore one from a backup, or start a new run"
        )
    require_any(run)
    return None


def latest_in_shards(run: Run, world: World, *, log: Callable[[str], object] = print) -> Path | None:
    """Return the newest intact checkpoint if its format is dcp, or None if it is dense or there is none.

    All processes must call this. They verify the files in turn (process r of n takes the files r, r + n, ...), so that
    each file is read once, and all use the result. Damaged checkpoints are renamed and reported as in `load_latest`.
    """
    while (path := world.from_writer(lambda: _newest_in_shards(run))) is not None:
        faults = [fault for fault in world.gather(_fault_in_part(path, world)) if fault is not None]
        if world.from_writer(partial(_is_usable, run, path, faults, log)):
            return path
    return None


def _newest_in_shards(run: Run) -> Path | None:
    _clear_leftovers(run)
    path = next((path for _, path in steps_on_disk(run)), None)
    return path if path is not None and (path / SHARDS).is_dir() else None


def _fault_in_part(path: Path, world: World) -> str | None:
    """Return what is wrong with the files that this process has to verify, or None."""
    try:
        files = sorted(listed_files(path).items())
        for name, (size, digest) in files[world.rank :: world.size]:
            verified_file(path, name, size, digest)
    except Damaged as fault:
        return str(fault)
    return None


def _is_usable(run: Run, path: Path, faults: list[str], log: Callable[[str], object]) -> bool:
    """Return whether the checkpoint belongs to the run and has no faults; rename it if not."""
    try:
        if faults:
            raise Damaged(faults[0])
        require_own(run, path, {STATE: (path / STATE).read_bytes()})
    except Damaged as fault:
        _report_and_set_aside(path, fault, log)
        return False
    return True


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, as the name of its folder states."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint that has been verified."""
    return _state({STATE: (path / STATE).read_bytes()})


def _report_and_set_aside(path: Path, fault: Damaged, log: Callable[[str], object]) -> None:
    aside = _set_aside(path)
    log(f"a checkpoint cannot be used and was renamed to {aside.name}; trying the previous one: {fault}")


def require_any(run: Run) -> None:
    """Raise CheckpointError if a run has no checkpoints although its status records one."""
    step = run.saved_step()
    if step and not any(run.checkpoints.glob("step-*")):
        raise CheckpointError(
            f"{run.checkpoints} contains no checkpoint, although this run had one of step {step}; restore it from a "
            "backup, or start a new run"
        )


def _set_aside(path: Path) -> Path:
    aside, number = path.with_name(f"{path.name}.corrupt"), 2
    while aside.exists():
        aside, number = path.with_name(f"{path.name}.corrupt-{number}"), number + 1
    os.rename(path, aside)
    return aside


def _to_stderr(text: str) -> None:
    print(escape_controls(f"warning: {text}"), file=sys.stderr)


def load_model(
    run: Run, step: int | None = None, *, log: Callable[[str], object] = _to_stderr
) -> tuple[int, dict[str, Tensor]]:
    """Return (step, weights) of the newest intact checkpoint, or of the checkpoint of `step`. Renames nothing. Raises
    CheckpointError.

    If newer checkpoints are damaged, a message is logged.
    """
    candidates = steps_on_disk(run)
    if step is not None:
        have = ", ".join(str(found) for found, _ in reversed(candidates)) or "none"
        candidates = [(found, path) for found, path in candidates if found == step]
        if not candidates:
            raise CheckpointError(f"{run.path} has no checkpoint of step {step}; it has {have}")
    faults = []
    for found, path in candidates:
        try:
            weights = _read(run, path, with_optim=False).model
        except Damaged as fault:
            faults.append(str(fault))
            continue
        if faults:
            log(f"using the checkpoint of step {found}, because newer ones cannot be used: {'; '.join(faults)}")
        return found, weights
    if faults:
        raise CheckpointError(f"no checkpoint of {run.path} can be used: {'; '.join(faults)}")
    raise CheckpointError(f"{run.path} has no checkpoint yet; train it first: unmask resume {run.path}")


def is_complete(run: Run, step: int) -> bool:
    """Return whether this run has an intact checkpoint of `step`."""
    path = run.checkpoints / f"step-{step:08d}"
    try:
        require_own(run, path, verify(path))
        load_fixed(run.checkpoints)
    except CheckpointError:
        return False
    return True


def check_space(run: Run, needed: int) -> None:
    """Raise CheckpointFull if fewer than `needed` bytes are free on the disk of the run."""
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise CheckpointFull(
            f"checkpoints of this run need about {size(needed)}, but {run.path} has {size(free)} free; "
            "free space, or choose another --out or a smaller recipe"
        )


def newest_size(run: Run) -> int:
    """Return the size in bytes of the newest checkpoint, without verifying it; 0 if there is none."""
    paths = [path for _, path in steps_on_disk(run)[:1]]
    return sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())


def newest_step(run: Run) -> int | None:
    """Return the newest step that has a checkpoint, without verifying it, or None if no step has one."""
    return next((step for step, _ in steps_on_disk(run)), None)
