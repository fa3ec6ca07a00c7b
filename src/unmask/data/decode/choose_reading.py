"""Decide for a whole data set whether tagged bands are alpha, and which axis is the channel axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.data import limits
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.limited_process import SLACK, Crashed, TooSlow, call_in_process
from unmask.data.decode.npy import npy_shape
from unmask.data.decode.reading import Reading, axes_of_several, is_alpha, is_ambiguous
from unmask.data.decode.tiff import alpha_values
from unmask.data.sources.source import Source

SECONDS = 60.0  # Limit on processor time for all sampled files.
FILES = 32  # Number of files sampled of each kind (TIFF and .npy).


def choose_reading(source: Source, rows: Sequence[int]) -> tuple[Reading, tuple[str, ...]]:
    """Return the `Reading` of this data set, and a sentence about each decision.

    rows: rows of the source to sample from.
    """
    if not _named(source, rows, (".tif", ".tiff", ".npy")):
        return source.reading, ()
    try:  # in a separate process, because one of these files may crash a decoder
        return call_in_process(_decided, source, rows, memory=limits.MAX_DECODE_BYTES + SLACK, seconds=SECONDS)
    except (TooSlow, Crashed, MemoryError):
        return source.reading, ()  # `auto` is then decided for each file


def _decided(source: Source, rows: Sequence[int]) -> tuple[Reading, tuple[str, ...]]:
    reading, reasons = source.reading, []
    if reading.alpha == "auto" and reading.tagged == "auto":
        reading, reason = _tagged(source, _named(source, rows, (".tif", ".tiff")), reading)
        reasons += [reason] * bool(reason)
    if reading.axes == "auto":
        reading, reason = _axes(source, _named(source, rows, (".npy",)), reading)
        reasons += [reason] * bool(reason)
    return reading, tuple(reasons)


def _named(source: Source, rows: Sequence[int], endings: tuple[str, ...]) -> list[int]:
    """Return at most `FILES` rows with these extensions, evenly spaced."""
    fitting = [int(row) for row in rows if source.names[int(row)].lower().endswith(endings)]
    return (
        [fitting[place] for place in np.unique(np.linspace(0, len(fitting) - 1, FILES).astype(int))] if fitting else []
    )


def _tagged(source: Source, rows: list[int], reading: Reading) -> tuple[Reading, str]:
    real, bands = 0, 0
    for row in rows:
        try:
            values = alpha_values(source.read(row))
        except (BadImage, MemoryError):  # the scan reports unreadable files
            continue
        if values is not None and values.any():
            real, bands = (real + 1, bands) if is_alpha(values) else (real, bands + 1)
    if not real + bands:
        return reading, ""
    if real >= bands:
        return reading.model_copy(update={"tagged": "alpha"}), ""
    reason = (
        f"the last band of the TIFFs is tagged as alpha, but its values are data in {bands} of {real + bands} sampled "
        "files: it is kept as a band (set data.alpha to composite, drop or band to override)"
    )
    return reading.model_copy(update={"tagged": "band"}), reason


def _axes(source: Source, rows: list[int], reading: Reading) -> tuple[Reading, str]:
    shapes: list[tuple[int, ...]] = []
    for row in rows:
        try:
            shape = npy_shape(source.read(row))
        except (BadImage, MemoryError):
            continue
        if len(shape) == 3:
            shapes.append(shape)
    ambiguous = [shape for shape in shapes if is_ambiguous(shape)]
    if not ambiguous:
        return reading, ""
    order, why = axes_of_several(shapes)
    first = ambiguous[0]
    return reading.model_copy(update={"axes": order}), (
        f"arrays such as {first} are read as {'(H, W, bands)' if order == 'HWC' else '(bands, H, W)'}: {why}; "
        f"if that is wrong, --set data.axes={'CHW' if order == 'HWC' else 'HWC'}"
    )
