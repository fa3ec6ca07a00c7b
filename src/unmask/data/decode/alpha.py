"""Drop an alpha channel, or composite it on white; see `Layout.alpha`."""

from __future__ import annotations

import numpy as np

from unmask.data import limits
from unmask.data.decode.reading import Reading


def alpha_use(reading: Reading) -> str:
    """Return the `Layout.alpha` for a channel that is known to be alpha."""
    return {"drop": "dropped", "band": "band"}.get(reading.alpha, "composited")


def without_alpha(pixels: np.ndarray, alpha: str, *, premultiplied: bool = False) -> np.ndarray:
    """Apply `Layout.alpha` to (H, W, C + 1) values whose last channel is alpha."""
    if alpha == "band":
        return pixels
    return (
        np.ascontiguousarray(pixels[:, :, :-1])
        if alpha == "dropped"
        else _on_white(pixels, premultiplied=premultiplied)
    )


def _on_white(pixels: np.ndarray, *, premultiplied: bool = False) -> np.ndarray:
    """Composite (H, W, C + 1) integers, whose last channel is alpha, on white; return (H, W, C)."""
    top = np.iinfo(pixels.dtype).max
    out = np.empty((*pixels.shape[:2], pixels.shape[2] - 1), pixels.dtype)
    rows = max(1, limits.FLOAT64_PIXELS // pixels.shape[1])
    for start in range(0, len(pixels), rows):  # in pieces, because a whole image in float64 could take gigabytes
        part = pixels[start : start + rows]
        colour, alpha = part[:, :, :-1].astype(np.float64), part[:, :, -1:] / top
        mixed = colour * (1 if premultiplied else alpha) + top * (1 - alpha)
        out[start : start + rows] = mixed.round().clip(0, top)
    return out
