"""The manifest of a checkpoint: it lists all files with their sizes and SHA-256, and contains its own SHA-256.

    {"step": 1234,
     "run": {...},                          id of the run, digests of its config.json and plan.json; also in state.json
     "fixed": ["fixed-....safetensors"],    files beside the checkpoints that it needs
     "files": {"state.json": {"size": 310, "sha256": "..."}, ...},
     "run_id": "...", "sha256": "..."}      see `system/verified_json.py`; not in checkpoints of earlier versions

The digests are needed because neither torch, nor safetensors, nor the file system detects a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.engine.checkpoint_formats import MODEL, OPTIM, SHARD, SHARDS, CheckpointError, Damaged, Entry
from unmask.run import Identity, Run
from unmask.system import verified_json
from unmask.system.verified_json import ChangedJson

STATE, MANIFEST = "state.json", "MANIFEST.json"


def manifest_content(step: int, whose: Identity, fixed: list[str], files: Mapping[str, Entry]) -> bytes:
    """Return the content of a manifest. whose: the run of the checkpoint."""
    manifest = {"step": step, "run": asdict(whose), "fixed": fixed, "files": dict(files)}
    return verified_json.dump(manifest, whose.run_id)[0]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises Damaged."""
    try:
        return verified_json.load((path / MANIFEST).read_bytes()).value
    except FileNotFoundError:
        raise Damaged(f"{path}: {MANIFEST} is missing") from None
    except OSError as error:
        raise Damaged(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ChangedJson as fault:
        raise Damaged(f"{path}: {MANIFEST} {fault}") from None


def listed_files(path: Path) -> dict[str, tuple[int, str]]:
    """Return {file: (size, SHA-256)} of a checkpoint, as its manifest states. Raises Damaged."""
    manifest = read_manifest(path)
    try:
        name, entries = f"step-{manifest['step']:08d}", dict(manifest["files"])
        sizes = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: {MANIFEST} cannot be read ({type(error).__name__})") from None
    tensors = set(sizes) - {STATE}
    in_shards = bool(tensors) and all(SHARD.fullmatch(name) for name in tensors)
    if path.name.partition(".")[0] != name or STATE not in sizes or not (in_shards or tensors == {MODEL, OPTIM}):
        raise Damaged(f"{path}: {MANIFEST} belongs to another checkpoint")
    unlisted = {f"{SHARDS}/{file.name}" for file in (path / SHARDS).glob("*.safetensors")} - tensors
    if unlisted:
        raise Damaged(f"{path}: {min(unlisted)} is not in {MANIFEST}")
    return sizes


def verify(path: Path, use: Callable[[str, bytes], object] = lambda name, content: None) -> dict[str, bytes]:
    """Check a checkpoint's files against its manifest, and return the content of state.json. Raises Damaged.

    use: called with the name and the content of each file, once it has been checked. One file is in memory at a time. A
    suffix of the folder's name, such as .corrupt, is ignored.
    """
    for name, (size, digest) in listed_files(path).items():
        content = verified_file(path, name, size, digest)
        if name == STATE:
            state = content
        use(name, content)
    return {STATE: state}


def verified_file(path: Path, name: str, size: int, digest: str) -> bytes:
    """Return the content of a file of a checkpoint, which must have this size and SHA-256. Raises Damaged."""
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise Damaged(f"{path}: {name} cannot be read ({error.strerror})") from None
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise Damaged(f"{path}: {name} {_what_changed(content, size)}")
    return content


def _what_changed(content: bytes, size: int) -> str:
    if content[:1] == b"\x80" or content[:2] == b"PK":
        return "is a pickle, not safetensors; it was not opened, because a pickle can run code"
    if len(content) != size:
        return f"has {len(content)} bytes, but {size} were written"
    return "has changed since it was written (its SHA-256 differs)"


def require_own(run: Run, path: Path, contents: Mapping[str, bytes]) -> None:
    """Raise Damaged for a checkpoint of another run, or a checkpoint with settings that this run never had.

    Raises CheckpointError if the file of tensors that never change is missing.
    """
    manifest = read_manifest(path)
    told, fixed = manifest.get("run"), manifest.get("fixed")
    try:
        stated = json.loads(contents[STATE]).get("run")
    except (ValueError, AttributeError) as error:
        raise Damaged(f"{path}: {STATE} cannot be read ({type(error).__name__})") from None
    if stated != told:
        raise Damaged(f"{path}: {MANIFEST} and {STATE} belong to different runs")
    if why := run.why_foreign(Identity.of(stated)):
        raise Damaged(f"{path}: {why}")
    if missing := [name for name in fixed or () if not (run.checkpoints / str(name)).exists()]:
        raise CheckpointError(
            f"{run.checkpoints / missing[0]} is missing, and every checkpoint of this run needs it; restore it from a "
            "backup, or start a new run"
        )
