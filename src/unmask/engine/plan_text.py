"""Print a plan before training starts."""

from __future__ import annotations

from typing import Any

from unmask.config import Config
from unmask.console import Console
from unmask.engine.plan import Plan


def say_taken(config: Config, console: Console) -> None:
    """What came from files, in numbers, so that a mask upside down or another palette is seen at once."""
    method: Any = config.method
    if (patterns := getattr(method, "pattern", None)) is not None:
        marks = "".join(patterns[0])
        console.say(f"masks: {len(patterns)} drawn, {marks.count('#')} of {len(marks)} patches hidden")
    if (palette := getattr(method, "palette", None)) is not None:
        console.say(f"palette: {len(palette)} colours, given")


def say_plan(plan: Plan, config: Config, console: Console) -> None:
    console.say(
        f"recipe {config.recipe}: {config.method.name}, {plan.parameters / 1e6:.2f} M parameters "
        f"({plan.encoder_parameters / 1e6:.2f} M in the encoder)"
    )
    for reason in plan.reasons:
        console.say(f"  {reason}")
    console.say(
        f"{plan.steps} steps of {plan.batch_size} images = {plan.epochs:.1f} epochs, "
        f"warm-up {plan.warmup_steps} steps, {plan.precision} on {plan.device}"
    )
