"""Tensors of a run that never change after step 0, such as a tokenizer, stored once beside all checkpoints.

The name of the file, checkpoints/fixed-<digest>.safetensors, contains its SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from unmask.engine.checkpoint_formats import CheckpointError, CheckpointFull, on_cpu
from unmask.run import Run
from unmask.system.atomic_files import replace_file

FIXED = "fixed-*.safetensors"


def save_fixed(run: Run, tensors: Mapping[str, Tensor]) -> None:
    """Store the tensors that never change, once for all steps. The file's name contains its SHA-256.

    Raises CheckpointFull.
    """
    content = safetensors.torch.save(on_cpu(tensors))
    file = run.checkpoints / f"fixed-{hashlib.sha256(content).hexdigest()}.safetensors"
    try:
        replace_file(file, content)
        for other in run.checkpoints.glob(FIXED):  # temporary files of an interrupted start
            if other != file:
                other.unlink()
    except OSError as error:
        raise CheckpointFull(f"{file} could not be written: {error.strerror}; free space and start again") from error


def load_fixed(checkpoints: Path) -> dict[str, Tensor]:
    """Return the tensors that `save_fixed` stored, or {} if it stored none.

    Raises CheckpointError if the files of these tensors are damaged.
    """
    for file in checkpoints.glob(FIXED):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}), and every checkpoint of this run needs it; make it "
                "readable, restore it from a backup, or start a new run"
            ) from None
        if file.stem.removeprefix("fixed-") != hashlib.sha256(content).hexdigest():
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 differs from its name, and every checkpoint of this run needs it; "
                "restore it from a backup, or start a new run"
            )
        return safetensors.torch.load(content)
    return {}
