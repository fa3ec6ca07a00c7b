"""Build the configuration of a supervised run from a recipe, the encoder of a run, and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.config import Config, ConfigError, Graft, method_module, parse, task_class, task_names
from unmask.console import Console
from unmask.data.annotations.segmentation_masks import SegmentationMasks
from unmask.data.augment import crop_for
from unmask.engine import checkpoint, resolve
from unmask.engine.image_size import dense_size
from unmask.engine.load import read_config, read_plan
from unmask.engine.time_budget import Budget
from unmask.errors import UserError
from unmask.finetuning.annotated import (
    AnnotatedImages,
)
from unmask.finetuning.choose_recipe import finetuning_recipes
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig
from unmask.recipes import catalogue
from unmask.run import Run
from unmask.task import TaskConfig
from unmask.tasks import classify

PLAIN = "classify"
PLAIN_OPTIM = OptimConfig(base_lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=0.05)
UNSETTABLE = {
    "data.mean": "the normalisation belongs to the weights; leave it out",
    "data.std": "the normalisation belongs to the weights; leave it out",
}


def finetuning_config(pretrained: Config, classes: Sequence[str], recipe: str = PLAIN) -> Config:
    """Return the configuration of a supervised run with the encoder and images of `pretrained`, without weights.

    recipe: name from `recipes/fine_tuning.py`, or PLAIN, which trains for as long as `pretrained`.
    Raises ConfigError if the encoder is not a vision transformer, or the recipe is not for
    fine-tuning.
    """
    encoder = pretrained.method.encoder
    if not isinstance(encoder, ViTConfig):
        raise ConfigError(
            f"got a run of {pretrained.method.name}; only vision transformers can be fine-tuned; choose a run or a "
            "recipe that has one, such as mae_nano"
        )
    if recipe == PLAIN:
        method = classify.Config(encoder=encoder, classes=tuple(classes))
        return Config(recipe=PLAIN, method=method, data=pretrained.data, optim=PLAIN_OPTIM, train=pretrained.train)
    found = catalogue.find(recipe)
    if found.method.name not in task_names():
        raise ConfigError(
            f"got recipe {recipe}, which pre-trains without labels; choose one of {', '.join(finetuning_recipes())}, "
            "or leave --recipe out"
        )
    crop = crop_for(found.data.crop, pretrained.data.size, found.data.size)
    data = pretrained.data.model_copy(update={"crop": crop})
    changes = {"encoder": encoder, "classes": tuple(classes)}
    return found.model_copy(update={"method": found.method.model_copy(update=changes), "data": data})


def require_settable(task: str, asked: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings KEY=VALUE that fine-tuning determines itself, or that would have no effect."""
    if refusal := task_settings(task).refusal(asked):
        raise ConfigError(refusal)
    for key, why in UNSETTABLE.items():
        if key in asked:
            raise ConfigError(f"{key} cannot be set: {why}")


def enlarged(config: Config, median: tuple[int, int], most: tuple[int, int], console: Console) -> Config:
    """Return the configuration with a larger image size if the size of the pre-training is too small for the task."""
    size, own = dense_size(config, median, most), config.data.size
    if size == own:
        return config
    larger = config.model_copy(update={"data": config.data.model_copy(update={"size": size})})
    try:
        resolve.require_method(larger)
    except UserError:  # the task cannot use this size
        return config
    console.print(
        f"size {size[0]} x {size[1]}: the encoder was pre-trained at {own[0]} x {own[1]}, which is small for this task "
        f"and these images; --set data.size=[{own[0]},{own[1]}] keeps it"
    )
    return larger


def config_from_run(run: Run, classes: Sequence[str], recipe: str = PLAIN, *, from_scratch: bool = False) -> Config:
    """Return `finetuning_config` for a run, with its newest weights, image size and normalisation."""
    step, _ = checkpoint.load_model(run)
    plan = read_plan(run)
    config, spec = finetuning_config(read_config(run), classes, recipe), plan.images
    data: dict[str, Any] = {"size": spec.size, "channels": spec.channels, "mean": spec.mean, "std": spec.std}
    data |= config.data.decided_settings(plan.reading)
    if config.data.pages == "samples":  # labels belong to files, not to pages of files
        data["pages"] = "first"
    none = dict.fromkeys(("test", "annotations", "test_annotations", "test_split"))
    taken = Graft(run=str(run.path.absolute()), source="encoder.", target="encoder.", step=step)
    graft = () if from_scratch else (taken,)
    if from_scratch:
        config = config.model_copy(update={"method": settings_of(config).from_scratch()})
    return config.model_copy(update={"data": config.data.model_copy(update=data | none), "graft": graft})


def steps_like(other: str | Path | None, settings: Sequence[str], budget: Budget | None) -> list[str]:
    """Return the steps and batch size of another run as settings.

    Raises ConfigError if other options also set the steps or the batch size.
    """
    if other is None:
        return []
    plan, asked = read_plan(Run.open(other)), parse(settings)
    both = [key for key in ("train.steps", "train.epochs", "train.batch_size") if key in asked]
    if budget is not None or both:
        option = "--budget" if budget is not None else both[0]
        raise ConfigError(f"got both --steps-of and {option}, which both set the length; leave one of them out")
    return [f"train.steps={plan.steps}", f"train.batch_size={plan.batch_size}"]


def with_masks(config: Config, annotated: AnnotatedImages) -> Config:
    """Add the options with which the masks were read to the configuration, where a resumed run finds them."""
    if not isinstance(maps := annotated.annotations, SegmentationMasks):
        return config
    return config.model_copy(update={"method": settings_of(config).with_masks(maps)})


def task_settings(task: str) -> type[TaskConfig]:
    """Return the class of a task's settings. Raises ConfigError for an unknown task."""
    task_class(task)
    return method_module(task).Config


def settings_of(config: Config) -> TaskConfig:
    """Return the settings of a supervised run's task."""
    assert isinstance(config.method, TaskConfig), "only supervised runs have a task"
    return config.method
