"""Find recipes. A recipe is a public function in this folder without arguments that returns a `Config`.

There is no registry: a new function in any file of `recipes/` is found by its name. `choose` implements the recipe
`auto`, and `describe` the output of `unmask recipes NAME`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Container
from itertools import groupby
from typing import Any

from pydantic import BaseModel

import unmask.recipes
from unmask.config import Config, ConfigError, keys
from unmask.errors import nearest

FEWEST_STEPS = 3_000  # least number of updates of `auto`, also for small data sets
MOST_ELONGATED = 2.5
FEWEST_VISIBLE = 16  # least number of visible patches when three quarters are hidden
AUTO = ("mae_nano", "mae_tiny", "mae_small", "mae_base")
"""The recipes that `choose` considers."""
BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def all_recipes() -> dict[str, Callable[[], Config]]:
    """Return functions by name, in the order of the files and of the functions in them."""
    recipes: dict[str, Callable[[], Config]] = {}
    for module in pkgutil.iter_modules(unmask.recipes.__path__):
        for name, thing in vars(importlib.import_module(f"unmask.recipes.{module.name}")).items():
            if inspect.isfunction(thing) and not name.startswith("_"):
                signature = inspect.signature(thing)
                if not signature.parameters and signature.return_annotation in ("Config", Config):
                    recipes[name] = thing
    return recipes


GROUPS = {
    "mae": "MAE: hidden patches are rebuilt from the visible ones",
    "crossmae": "CrossMAE and SimMIM: relatives of MAE",
    "simmim": "CrossMAE and SimMIM: relatives of MAE",
    "beit": "BEiT, and the dVAE tokenizers whose codes it predicts",
    "dvae": "BEiT, and the dVAE tokenizers whose codes it predicts",
    "igpt": "iGPT and masked patch prediction",
    "mpp": "iGPT and masked patch prediction",
    "ae": "Autoencoders",
    "dae": "Autoencoders",
    "fine_tuning": "Supervised training: `unmask finetune` and `unmask probe --kind paper-linear`",
    "demo_recipes": "Recipes of `unmask demo`",
}
"""Titles of groups by file of `recipes/`, in the order of `unmask recipes`; any other file is its own group."""


def grouped() -> dict[str, list[str]]:
    """Return the names of the recipes by the title of their group, as `unmask recipes` lists them."""
    files = {name: function.__module__.rpartition(".")[2] for name, function in all_recipes().items()}
    order = [*GROUPS, *sorted(set(files.values()) - set(GROUPS))]
    groups: dict[str, list[str]] = {}
    for name in sorted(files, key=lambda name: order.index(files[name])):  # sorted() keeps the order in each file
        groups.setdefault(GROUPS.get(files[name], files[name]), []).append(name)
    return groups


def first_line(function: Callable[[], Config]) -> str:
    """Return the first line of a recipe's docstring."""
    return (function.__doc__ or "").strip().splitlines()[0]


def find(name: str) -> Config:
    """Return the recipe of that name. Raises ConfigError with the nearest names."""
    recipes = all_recipes()
    if name == "auto":
        raise ConfigError(
            "recipe 'auto' is chosen from the data and has no settings of its own; `unmask check DATA` shows which of "
            f"{', '.join(AUTO)} is chosen"
        )
    if name not in recipes:
        raise ConfigError(f"recipe {name!r} is not known; {nearest(name, [*recipes, 'auto'])}")
    return recipes[name]()


def describe(name: str) -> str:
    """Describe a recipe: its docstring, then every key with its value and the allowed values.

    Each section begins with the docstrings of its settings. Raises ConfigError with the nearest names.
    """
    config = find(name)
    blocks = [inspect.getdoc(all_recipes()[name]) or name]
    for _, group in groupby(keys(config), key=lambda key: key.split(".")[0]):
        owners = {key: _owner(config, key) for key in group}
        notes = []
        for path, settings in {key.rpartition(".")[0]: settings for key, settings in owners.items()}.items():
            if path and (doc := type(settings).__doc__):
                notes.append(f"{path}:\n{inspect.cleandoc(doc)}")
        lines = [f"# {line}".rstrip() for line in "\n\n".join(notes).splitlines()]
        rows = []
        for key, settings in owners.items():
            leaf = key.rpartition(".")[2]
            allowed = _allowed(type(settings).model_json_schema()["properties"][leaf])
            rows.append((f"{key} = {_text(getattr(settings, leaf))}", allowed))
        width = max(len(setting) for setting, _ in rows)
        lines += [f"{setting:{width}}  # {allowed}" if allowed else setting.rstrip() for setting, allowed in rows]
        blocks.append("\n".join(lines))
    blocks.append(
        "Change any of these with --set KEY=VALUE; KEY=none unsets a value. Comments above each section describe the "
        "keys."
    )
    return "\n\n".join(blocks)


def _owner(config: Config, key: str) -> BaseModel:
    """Return the settings that contain a dotted key."""
    owner: Any = config
    for part in key.split(".")[:-1]:
        owner = getattr(owner, part)
    return owner


def _text(value: object) -> str:
    """Format a value as `--set` reads it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, separators=(",", ":"))


def _allowed(schema: dict[str, Any]) -> str:
    """Describe a field's choices or bounds, from its JSON schema; return "" if any value of its type is allowed."""
    if "anyOf" in schema:
        parts = [_allowed(part) for part in schema["anyOf"]]
        return ", or ".join(parts) if all(parts) else ""
    if "enum" in schema:
        return f"{', '.join(schema['enum'][:-1])} or {schema['enum'][-1]}"
    if "const" in schema:
        return f"only {schema['const']}"
    if schema.get("type") == "array":
        items = [schema["items"]] if "items" in schema else schema.get("prefixItems", [{}])
        each = _allowed(items[0])
        return f"each {each}" if each else ""
    if (kind := schema.get("type")) in ("boolean", "null"):
        return {"boolean": "true or false", "null": "none"}[kind]
    return " and ".join(f"{words} {schema[key]}" for key, words in BOUNDS.items() if key in schema)


def choose(
    num_images: int,
    median_size: tuple[int, int],
    device: str,
    *,
    fixed: Container[str] = (),
    size: tuple[int, int] | None = None,
    about: bool = False,
) -> tuple[str, list[str], list[str]]:
    """Choose the recipe `auto` from the number of images, their median (H, W) in pixels, and the device.

    fixed: keys that the user has set, which are not changed. size: data.size if the user has set it; the patch is
    chosen to fit. about: the number of images is an estimate. Returns (recipe name, overrides as KEY=VALUE, reasons as
    sentences).
    """
    height, width = median_size
    side = min(height, width)
    reasons = [f"{'about ' * about}{num_images} images of {height} x {width} pixels (median) on {device}"]
    if side < 48:
        name, patch, small = "mae_nano", 4, max(16, round(side / 4) * 4)
        reasons.append("mae_nano: small images")
    elif device == "cpu":
        name, patch, small = "mae_nano", 8, 64
        at = " at 64 pixels" if size is None else ""
        reasons.append(f"mae_nano{at}: without a GPU, images and model are small")
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

    whole = patch
    if size is None:
        patch = fitting_patch(whole, lambda patch: shape_for(median_size, small, patch))
        shape = shape_for(median_size, small, patch)
        reason = f"model grid {shape[0]} x {shape[1]}: the images are not square" if shape[0] != shape[1] else None
        propose("data.size", f"[{shape[0]},{shape[1]}]", reason)
    else:
        patch = fitting_patch(whole, lambda _: size)
    height, width = size or shape_for(median_size, small, patch)
    reason = f"patch {patch}: {height * width // patch**2 // 4} visible patches when three quarters are hidden"
    propose("method.encoder.patch", f"[{patch},{patch}]", reason if patch != whole else None)
    base = find(name)
    batch = base.train.batch_size
    while batch > 16 and batch * 8 > num_images:
        batch //= 2
    if batch != base.train.batch_size:
        enough = batch * 8 <= num_images
        why = f"an epoch of {num_images} images has at least eight steps" if enough else f"only {num_images} images"
        propose("train.batch_size", batch, f"batch {batch}: {why}")
    epochs = base.train.epochs or 100
    if epochs * num_images / batch < FEWEST_STEPS:
        updates = f"{epochs * num_images / batch:.0f}"
        propose("train.steps", FEWEST_STEPS, f"{FEWEST_STEPS} steps: {epochs:g} epochs would be only {updates} updates")
    return name, overrides, reasons


def shape_for(median_size: tuple[int, int], small: int, patch: int) -> tuple[int, int]:
    """Return the model's (H, W): square, or for wide or tall images their shape, rounded to whole patches."""
    height, width = median_size
    elongation = max(height, width) / min(height, width)
    if elongation < 1.25:
        return small, small
    longer = round(min(MOST_ELONGATED, elongation) * small / patch) * patch
    return (longer, small) if height > width else (small, longer)


def fitting_patch(most: int, shape: Callable[[int], tuple[int, int]]) -> int:
    """Return the largest patch from `most` down to its half that divides its image size and leaves enough patches
    visible.

    `shape` maps a patch size to an image size. If too few patches would be visible with all patch sizes, return the
    smallest that divides its image size, or `most` if none does.
    """
    divides = most
    for patch in range(most, most // 2 - 1, -1):
        height, width = shape(patch)
        if height % patch == width % patch == 0:
            divides = patch
            if height * width // patch**2 // 4 >= FEWEST_VISIBLE:
                break
    return divides
