"""Choose a fine-tuning recipe by the task, the width of the encoder and the number of labels."""

from __future__ import annotations

from typing import Any

from unmask.config import ConfigError, task_class, task_names
from unmask.nn.vit import ViTConfig
from unmask.recipes import catalogue
from unmask.task import Task

DEFAULT_TASK = "classify"
FEW, SOME = 1_000, 10_000
BASE, LARGE, HUGE = 700, 1_000, 1_200  # smallest widths of the encoders that these recipes are for


def finetuning_recipes() -> list[str]:
    """Return the names of all fine-tuning recipes."""
    return [name for name, make in catalogue.all_recipes().items() if make().method.name in task_names()]


def task_for(task: str | None, recipe: str) -> str:
    """Return the task of a fine-tuning: the task of the recipe, or classify for the recipe "auto".

    task: the requested task, or None. Raises ConfigError if the task is unknown, or does not fit the recipe.
    """
    if recipe in ("auto", DEFAULT_TASK):
        own = None
    elif (own := catalogue.find(recipe).method.name) not in task_names():
        raise ConfigError(
            f"got recipe {recipe}, which pre-trains without labels; choose one of {', '.join(finetuning_recipes())}, "
            "or leave --recipe out"
        )
    if task is not None:
        task_class(task)
        if own is not None and own != task:
            raise ConfigError(f"got --task {task} and recipe {recipe}, which is for --task {own}; change one of them")
    return task or own or DEFAULT_TASK


def choose_recipe(
    task: type[Task[Any, Any]], encoder: ViTConfig, labelled: int, *, from_scratch: bool
) -> tuple[str, str]:
    """Return (recipe, reason), chosen by the task, the width of the encoder and the number of labelled images."""
    if task.recipe_depends_on == "nothing":
        return task.recipe, f"recipe {task.recipe}: the only one of this task"
    if task.recipe_depends_on == "width":
        name = f"{task.recipe}_{'base' if encoder.width >= BASE else 'nano'}"
        return name, f"recipe {name}: encoder of width {encoder.width}"
    amount = "few" if labelled <= FEW else "some" if labelled <= SOME else "nano"
    if encoder.width >= BASE and labelled > SOME:
        amount = "huge" if encoder.width >= HUGE else "large" if encoder.width >= LARGE else "base"
        amount = "large" if from_scratch and amount == "huge" else amount
    name = f"{'scratch' if from_scratch else task.recipe}_{amount}"
    return name, f"recipe {name}: encoder of width {encoder.width} and {labelled} labelled images"
