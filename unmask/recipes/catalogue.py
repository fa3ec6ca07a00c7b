"""Finds recipes. A recipe is a public function in this folder that takes nothing and returns a `Config`.

Not a registry: a new function in any file here is found by its name. `choose` is the recipe called `auto`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Container

import unmask.recipes
from unmask.config import Config, ConfigError, nearest

FEWEST_STEPS = 3_000  # updates, not epochs, are what small data sets lack
MOST_ELONGATED = 2.5


def all_recipes() -> dict[str, Callable[[], Config]]:
    """Name -> function, in the order of the files and of the functions in them."""
    found: dict[str, Callable[[], Config]] = {}
    for module in pkgutil.iter_modules(unmask.recipes.__path__):
        for name, thing in vars(importlib.import_module(f"unmask.recipes.{module.name}")).items():
            if inspect.isfunction(thing) and not name.startswith("_"):
                signature = inspect.signature(thing)
                if not signature.parameters and signature.return_annotation in ("Config", Config):
                    found[name] = thing
    return found


def find(name: str) -> Config:
    """The recipe of that name. Raises ConfigError with the nearest names."""
    recipes = all_recipes()
    if name not in recipes:
        raise ConfigError(f"recipe {name!r} is not known; {nearest(name, [*recipes, 'auto'])}")
    return recipes[name]()


def choose(
    num_images: int, median_size: tuple[int, int], device: str, *, fixed: Container[str] = ()
) -> tuple[str, list[str], list[str]]:
    """The recipe `auto`: from the number of images, their median (H, W) in pixels, and the device.

    fixed: keys that a person has set; nothing is proposed for them. Returns (recipe name, overrides as KEY=VALUE,
    reasons as sentences).
    """
    height, width = median_size
    side = min(height, width)
    reasons = [f"{num_images} images of {height} x {width} pixels (median) on {device}"]
    if side < 48:
        name, patch, small = "mae_nano", 4, max(16, round(side / 4) * 4)
        reasons.append("mae_nano: small images")
    elif device == "cpu":
        name, patch, small = "mae_nano", 8, 64
        reasons.append("mae_nano at 64 pixels: no GPU, so images are made small and the model too")
    elif side < 160 or num_images < 20_000:
        name, patch, small = "mae_tiny", 8, 96 if side >= 96 else round(side / 8) * 8
        reasons.append("mae_tiny: small images" if side < 160 else "mae_tiny: fewer than 20,000 images")
    elif num_images < 300_000:
        name, patch, small = "mae_small", 16, 224
        reasons.append("mae_small: between 20,000 and 300,000 images")
    else:
        name, patch, small = "mae_base", 16, 224
        reasons.append("mae_base: 300,000 images or more")

    overrides: list[str] = []

    def propose(key: str, value: object, reason: str | None = None) -> None:
        if key not in fixed:
            overrides.append(f"{key}={value}")
            if reason:
                reasons.append(reason)

    size, reason = (small, small), None
    if max(height, width) >= 1.25 * side:  # keep the shape of wide or tall images
        longer = min(MOST_ELONGATED, max(height, width) / side) * small
        longer = round(longer / patch) * patch
        size = (longer, small) if height > width else (small, longer)
        reason = f"model grid {size[0]} x {size[1]}: the images are not square"
    propose("data.size", f"[{size[0]},{size[1]}]", reason)
    propose("method.encoder.patch", f"[{patch},{patch}]")
    base = find(name)
    batch = base.train.batch_size
    while batch > 16 and batch * 8 > num_images:
        batch //= 2
    if batch != base.train.batch_size:
        propose("train.batch_size", batch, f"batch {batch}: so that {num_images} images make at least eight steps")
    epochs = base.train.epochs or 100
    if epochs * num_images / batch < FEWEST_STEPS:
        updates = f"{epochs * num_images / batch:.0f}"
        propose("train.steps", FEWEST_STEPS, f"{FEWEST_STEPS} steps: {epochs:g} epochs would be only {updates} updates")
    return name, overrides, reasons
