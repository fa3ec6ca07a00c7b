"""Print a plan before training starts."""

from __future__ import annotations

from collections.abc import Collection

from unmask.config import Config
from unmask.console import Console
from unmask.engine.training_plan import Plan


def print_inputs(config: Config, console: Console) -> None:
    """Print the settings that were read from files, so that an inverted mask or a wrong palette is noticed."""
    for line in config.method.from_files():
        console.print(line)


def print_plan(plan: Plan, config: Config, console: Console, *, printed: Collection[str] = ()) -> None:
    """Print the recipe, the reasons for the plan except those already `printed`, and its length."""
    console.print(
        f"recipe {config.recipe}: {config.method.name}, {plan.parameters / 1e6:.2f} M parameters "
        f"({plan.encoder_parameters / 1e6:.2f} M in the encoder)"
    )
    for reason in plan.reasons:
        if reason not in printed:
            console.print(f"  {reason}")
    console.print(
        f"{plan.steps} steps of {plan.batch_size} images = {plan.epochs:.1f} epochs, "
        f"warm-up {plan.warmup_steps} steps, {plan.precision} on {plan.device}"
    )
