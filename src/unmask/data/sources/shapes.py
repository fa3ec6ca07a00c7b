"""Generate `shapes`, an embedded, labelled image set: image i is a pure function of SEED and i.

Each image shows one object of six classes with random position, size, rotation and colour, plain or striped, on a
background with a random colour gradient, plus noise. Only the outline depends on the class, so raw pixels predict the
class poorly. Hidden parts of the outline follow from the visible parts, so a masked autoencoder can learn from them.

Many images are drawn at once with NumPy from signed distances (negative inside), antialiased over one pixel. The set is
not an established benchmark; it is small enough for pre-training within minutes on two cores. Notation: n images of S x
S pixels.
"""

from __future__ import annotations

import numpy as np

from unmask.rng import Stream, uniform

CLASSES = ("cross", "disc", "half disc", "ring", "square", "triangle")
SIZE = 24
TRAIN, TEST = 20_000, 4_000
SEED = 20_211_111
DRAWS = 24
CHUNK = 2_000


def draw(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, S, S, 3) uint8 and labels (n,) int64 for indices (n,); each depends only on its own index."""
    index = np.asarray(index, np.int64)
    pieces = [_draw(index[i : i + CHUNK]) for i in range(0, len(index), CHUNK)]
    if not pieces:
        return np.zeros((0, SIZE, SIZE, 3), np.uint8), np.zeros(0, np.int64)
    return np.concatenate([images for images, _ in pieces]), np.concatenate([labels for _, labels in pieces])


def _draw(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    epoch = np.zeros_like(index)
    u = uniform(SEED, Stream.SHAPES, epoch, index, DRAWS)  # (n, DRAWS)
    label = np.minimum((u[:, 0] * len(CLASSES)).astype(np.int64), len(CLASSES) - 1)
    x, y, radius = _place(u[:, 1], u[:, 2], u[:, 3], u[:, 4])
    inside = np.clip(0.5 - _distance(label, x, y, radius), 0, 1)[..., None]  # (n, S, S, 1), antialiased over one pixel

    ground, figure = _colours(u[:, 5:11])
    slope = 50 * (u[:, 11:14] - 0.5)[:, None, None]  # gradient of the background per channel
    angle = 2 * np.pi * u[:, 14]
    across = np.linspace(-1, 1, SIZE)
    along = np.cos(angle)[:, None, None] * across[:, None] + np.sin(angle)[:, None, None] * across
    background = ground[:, None, None] + slope * along[..., None]

    period = 3.5 + 3 * u[:, 15]
    striped = (u[:, 16] < 0.5) * (12 + 18 * u[:, 17])
    wave = np.sin(2 * np.pi * (x / period[:, None, None] + u[:, 18, None, None]))
    foreground = figure[:, None, None] + (striped[:, None, None] * wave)[..., None]

    images = background + inside * (foreground - background)
    noise = uniform(SEED, Stream.SHAPES_NOISE, epoch, index, SIZE * SIZE * 3).reshape(images.shape)
    return (images + 16 * (noise - 0.5)).round().clip(0, 255).astype(np.uint8), label


def _place(across: np.ndarray, down: np.ndarray, size: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return each pixel's coordinates x and y (n, S, S) relative to the object, and the object's radius (n, 1, 1)."""
    radius = SIZE * (0.22 + 0.16 * size)[:, None, None]
    reach = SIZE / 2 - 0.85 * radius
    pixel = np.arange(SIZE) + 0.5 - SIZE / 2
    col = pixel - reach * (2 * across[:, None, None] - 1)  # (n, 1, S)
    row = pixel[:, None] - reach * (2 * down[:, None, None] - 1)  # (n, S, 1)
    angle = 2 * np.pi * turn[:, None, None]
    x = np.cos(angle) * col + np.sin(angle) * row
    y = -np.sin(angle) * col + np.cos(angle) * row
    return x, y, radius


def _distance(label: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the signed distance (n, S, S) in pixels from the outline of each image's class, negative inside."""
    out = np.empty_like(x)
    for number, name in enumerate(CLASSES):
        mine = label == number
        out[mine] = OUTLINES[name](x[mine], y[mine], radius[mine])
    return out


def _box(x: np.ndarray, y: np.ndarray, half_x: np.ndarray, half_y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the signed distance from an equilateral triangle with circumradius 1.15 r."""
    side = np.sqrt(3) / 2
    return np.maximum.reduce([-y, side * x + y / 2, -side * x + y / 2]) - 0.575 * r


OUTLINES = {
    "cross": lambda x, y, r: np.minimum(_box(x, y, r, 0.32 * r), _box(x, y, 0.32 * r, r)),
    "disc": lambda x, y, r: np.hypot(x, y) - 0.9 * r,
    "half disc": lambda x, y, r: np.maximum(np.hypot(x, y + 0.4 * r) - 1.1 * r, -(y + 0.4 * r)),
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
    "square": lambda x, y, r: _box(x, y, 0.8 * r, 0.8 * r),
    "triangle": _triangle,
}


def _colours(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return background and object colours (n, 3), at least 90 levels apart (Euclidean), for random draws (n, 6)."""
    ground = 30 + 195 * u[:, :3]
    figure = 20 + 215 * u[:, 3:6]
    gap = figure - ground
    length = np.maximum(np.linalg.norm(gap, axis=1, keepdims=True), 1e-6)
    return ground, ground + gap * np.maximum(1, 90 / length)
