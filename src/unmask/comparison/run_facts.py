"""What a run is and what it cost, and in what several runs differ."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.batch import ImageSpec
from unmask.config import Config, keys
from unmask.engine.flops import build_unallocated, count_flops
from unmask.engine.load import read_config, read_plan
from unmask.engine.measure import example_batch
from unmask.engine.plan import Plan
from unmask.recipes.catalogue import all_recipes
from unmask.report.training_log import last_loss, training_seconds
from unmask.run import Run

SAME_WITHIN = 0.01  # numbers closer than this share are the same
SINGULAR = ("image size", "training compute", "data")


def about(name: str, run: Run) -> dict[str, Any]:
    """What a Run is and what it cost."""
    config, plan = read_config(run), read_plan(run)
    status = run.status()
    trained = [row for row in run.metrics() if row.get("loss") is not None]
    flops = flops_of(config, plan.images)
    seen = status.step * plan.batch_size
    return {
        "name": name,
        "path": str(run.path),
        "method": config.method.name,
        "recipe": config.recipe,
        "source": config.data.place,
        "place": _place(config.data.source),
        "differs": _by_hand(config),
        "image": [plan.images.channels, *plan.images.size],
        "parameters": plan.parameters,
        "encoder_parameters": plan.encoder_parameters,
        "flops": flops,
        "state": status.shown_state or "waiting",
        "step": status.step,
        "steps": plan.steps,
        "images_seen": seen,
        "epochs": seen / plan.num_images if plan.num_images else 0.0,  # imported weights have seen none here
        "training_flops": None if flops["training"] is None else flops["training"] * seen,
        "images_per_second": statistics.median(row["images_per_second"] for row in trained) if trained else None,
        "seconds": training_seconds(trained),
        "loss": last_loss(trained) if trained else None,
        "device": _device(run, plan),
    }


def _place(source: str | Sequence[str]) -> list[str]:
    """Where the images are, spelled alike for every run: '/a/b/../c' and a link to /a/c are /a/c."""
    each = [source] if isinstance(source, str) else list(source)
    return [os.path.realpath(text) if os.path.isabs(text) else text for text in each]


def differences(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the runs do not have in common and a comparison of methods needs, by name, as sentences with the numbers."""
    kinds: dict[str, tuple[list[Any], list[str]]] = {
        "image size": (sizes := [row["image"][1:] for row in rows], [f"{size[0]} x {size[1]}" for size in sizes]),
        "channels": (channels := [row["image"][0] for row in rows], [str(number) for number in channels]),
        "data": ([row["place"] for row in rows], [row["source"] for row in rows]),
        "steps": (steps := [row["step"] for row in rows], [f"{number:,}" for number in steps]),
        "epochs": (epochs := [row["epochs"] for row in rows], [f"{number:.3g}" for number in epochs]),
        "images seen": (seen := [row["images_seen"] for row in rows], [f"{number:,}" for number in seen]),
        "training compute": (flops := [row["training_flops"] for row in rows], [_flops(number) for number in flops]),
        "parameters of the encoder": (
            sizes := [row["encoder_parameters"] for row in rows], [f"{number / 1e6:.2f} M" for number in sizes],
        ),
    }  # fmt: skip
    return {
        kind: f"The {kind} differ{'s' * (kind in SINGULAR)}: "
        + ", ".join(f"{row['name']} {said}" for row, said in zip(rows, words, strict=True))
        + "."
        for kind, (values, words) in kinds.items()
        if _differ(values)
    }


def _differ(values: Sequence[Any]) -> bool:
    if None in values:
        return False
    if all(isinstance(value, int | float) for value in values):
        return max(values) - min(values) > SAME_WITHIN * max(values)
    return any(value != values[0] for value in values)


def _flops(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.3g} FLOPs"


def caveat(differing: dict[str, str]) -> str:
    """What a ranking has to be read with; "" where the runs differ in nothing of that kind."""
    return f"; not a comparison of methods alone: the runs differ in {', '.join(differing)}" if differing else ""


def flops_of(config: Config, images: ImageSpec) -> dict[str, int | None]:
    """FLOPs of one image, by part; of an encoder that has no task only `whole`, the others are None."""
    if config.method.name != "encoder":
        flops = count_flops(config, images)
        return {**vars(flops), "forward": flops.forward}
    encoder = build_unallocated(config, images).encoder
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(example_batch(images, 1, "meta").images)
    none = dict.fromkeys(("encoder", "decoder", "rest", "training", "forward"))
    return {**none, "whole": counter.get_total_flops()}


def _by_hand(config: Config) -> list[str]:
    """Settings that are not the recipe's, as KEY=VALUE; [] for a recipe that is not known here."""
    if config.recipe not in (known := all_recipes()):
        return []
    base, found = known[config.recipe](), []
    both = [key for key in keys(config) if key in set(keys(base)) and key not in ("data.source", "graft")]
    for key in both:
        ours, theirs = (_value(tree, key) for tree in (config, base))
        if ours != theirs:
            found.append(f"{key}={ours}")
    return [*found, *(f"{entry.target or 'all weights'} from {entry.run}, step {entry.step}" for entry in config.graft)]


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def _device(run: Run, plan: Plan) -> str:
    machine = run.read("provenance.json").get("device") if (run.path / "provenance.json").exists() else None
    return f"{plan.precision} on {plan.device}" + (f" ({machine})" if machine else "")
