"""Cache of features on disk, so that repeated probes of an encoder on the same images do not recompute them.

The cache key of a table of features is a digest of everything that the features depend on (`key_of`): the encoder's
tensors, the layer and patch mask, the images and their crop, precision, device, and the code. A damaged cache file is
treated as missing, and a failed write is ignored. Three kinds of table are not cached: tables with tokens; tables with
unreadable images, which must be reported every time; and tables of generated images, which are quick to make.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unmask.data.files.npz_file import read_arrays, write_arrays
from unmask.data.scan.scan_cache import decoder_versions
from unmask.data.sources.source import Source
from unmask.evals.encoder_views import View
from unmask.evals.frozen_features import FeatureTable
from unmask.nn.image_encoder import ImageEncoder

MAX_BYTES = 2 << 30  # size limit of a cache folder; the least recently used tables are removed first
ENDING = ".arrays"
ARRAYS = ("cls", "mean", "digest")


def key_of(encoder: nn.Module, source: Source, rows: np.ndarray, *, about: Mapping[str, str]) -> str | None:
    """Return the cache key of this encoder's features for these rows, or None if they cannot be cached.

    about: precision, device, image size, crop and the method's settings, which the features also depend on.
    """
    if source.changed is None or (source.changed < 0).any():
        return None
    digest = hashlib.sha256(json.dumps({**about, **_code()}, sort_keys=True).encode())
    for text in (source.fingerprint(), _view(encoder)):
        digest.update(text.encode() + b"\0")
    for array in (source.changed, np.asarray(rows, np.int64)):
        digest.update(np.ascontiguousarray(array).data)
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def find(folder: Path, key: str, source: Source, rows: np.ndarray) -> FeatureTable | None:
    """Return the cached features for a key, with the labels of `source`; None for a missing or damaged file."""
    file = folder / f"{key}{ENDING}"
    stored = read_arrays(file)
    if stored is None:
        return None
    with suppress(OSError):  # a read-only folder
        os.utime(file)
    labels = None if source.labels is None else source.labels[rows]
    return FeatureTable(
        index=np.asarray(rows, np.int64),
        labels=labels,
        cls=stored.get("cls"),
        mean=stored["mean"],
        digest=stored["digest"],
    )


def store(folder: Path, key: str, table: FeatureTable, rows: np.ndarray) -> int:
    """Store a table of features, unless some of `rows` are missing in it; return the bytes written, 0 if not stored.

    The least recently used tables are removed first if the folder would exceed MAX_BYTES.
    """
    if table.tokens is not None or not np.array_equal(table.index, rows):
        return 0
    arrays = {name: value for name in ARRAYS if (value := getattr(table, name)) is not None}
    size = sum(value.nbytes for value in arrays.values())
    if size > MAX_BYTES:
        return 0
    try:
        _free_space(folder, MAX_BYTES - size)
        return write_arrays(folder / f"{key}{ENDING}", arrays)
    except (OSError, MemoryError):  # a full disk or a read-only folder
        return 0


def _free_space(folder: Path, most: int) -> None:
    """Remove the least recently used tables from a cache folder until the others take at most `most` bytes."""
    tables = sorted(folder.glob(f"*{ENDING}"), key=lambda file: file.stat().st_mtime_ns)
    total = sum(file.stat().st_size for file in tables)
    while total > most:
        total -= tables[0].stat().st_size
        tables.pop(0).unlink()


def _view(encoder: nn.Module) -> str:
    """Return the layer and the patch mask of an encoder as text for the cache key."""
    inner = encoder.encoder if isinstance(encoder, View) else encoder
    about = {"type": type(inner).__name__, "own layer": inner.layer if isinstance(inner, ImageEncoder) else None}
    if isinstance(encoder, View):
        about |= {"layer": encoder.layer, "hidden": encoder.hide is not None, "mask": encoder.mask}
    return json.dumps(about, default=str, sort_keys=True)


@cache
def _code() -> dict[str, str]:
    """Return the versions of torch and the decoders, and a digest of this package, on which features depend."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return {"torch": torch.__version__, "code": digest.hexdigest(), **decoder_versions()}
