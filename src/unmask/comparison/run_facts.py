"""Read the settings and cost of runs, and list the differences between them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.batch import ImageSpec
from unmask.config import ENCODER, Config, keys
from unmask.engine.flops import build_unallocated, count_flops
from unmask.engine.load import read_config, read_plan
from unmask.engine.measure import example_batch
from unmask.engine.training_plan import Plan
from unmask.recipes.catalogue import all_recipes
from unmask.report.training_log import last_loss, trained_rows, training_seconds
from unmask.run import PROVENANCE, Run

SAME_WITHIN = 0.01  # largest relative difference between numbers that count as equal


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs of one image, for every part of a method (see `engine.flops.Flops`); a bare encoder has only `whole`."""

    whole: int
    encoder: int | None = None
    decoder: int | None = None
    rest: int | None = None
    training: int | None = None
    forward: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The settings and cost of a run.

    source: path of the training images as given on the command line. place: the same paths, absolute and without links.
    differs: settings that differ from the recipe, as KEY=VALUE. image: shape (C, H, W) of an image. state: state that
    `unmask ls` shows. seconds: training time.
    """

    name: str
    path: str
    method: str
    recipe: str
    source: str
    place: tuple[str, ...]
    differs: tuple[str, ...]
    image: tuple[int, int, int]
    parameters: int
    encoder_parameters: int
    flops: ImageFlops
    state: str
    step: int
    steps: int
    images_seen: int
    epochs: float
    training_flops: int | None
    images_per_second: float | None
    seconds: float
    loss: float | None
    device: str


def run_facts(name: str, run: Run) -> RunFacts:
    """Read the settings and cost of a run. name: the run's name on the page."""
    config, plan, status = read_config(run), read_plan(run), run.status()
    trained = trained_rows(run.metrics())
    flops = image_flops(config, plan.images)
    seen = status.step * plan.batch_size
    return RunFacts(
        name=name,
        path=str(run.path),
        method=config.method.name,
        recipe=config.recipe,
        source=config.data.place,
        place=absolute_places(config.data.source),
        differs=tuple(_changed_settings(config)),
        image=(plan.images.channels, *plan.images.size),
        parameters=plan.parameters,
        encoder_parameters=plan.encoder_parameters,
        flops=flops,
        state=status.shown_state or "waiting",
        step=status.step,
        steps=plan.steps,
        images_seen=seen,
        epochs=seen / plan.num_images if plan.num_images else 0.0,  # imported runs have no training images
        training_flops=None if flops.training is None else flops.training * seen,
        images_per_second=statistics.median(row["images_per_second"] for row in trained) if trained else None,
        seconds=training_seconds(trained),
        loss=last_loss(trained) if trained else None,
        device=_device(run, plan),
    )


def absolute_places(source: str | Sequence[str]) -> tuple[str, ...]:
    """Resolve the paths of a data source, so that different spellings of a path, and links, are recognised as equal."""
    each = [source] if isinstance(source, str) else list(source)
    return tuple(os.path.realpath(text) if os.path.isabs(text) else text for text in each)


@dataclass(frozen=True)
class _Quantity:
    """A quantity that should be the same for all runs when methods are compared.

    values: one value per run. texts: the same values as text.
    """

    name: str
    values: Sequence[Any]
    texts: Sequence[str]
    verb: str = "differ"


def differences(runs: Sequence[RunFacts]) -> dict[str, str]:
    """Return, for every quantity that differs between the runs, its name and a sentence with its values."""
    sentences = {}
    for quantity in _quantities(runs):
        if _differ(quantity.values):
            each = ", ".join(f"{run.name} {text}" for run, text in zip(runs, quantity.texts, strict=True))
            sentences[quantity.name] = f"The {quantity.name} {quantity.verb}: {each}."
    return sentences


def _quantities(runs: Sequence[RunFacts]) -> Iterator[_Quantity]:
    def counted(name: str, values: Sequence[int]) -> _Quantity:
        return _Quantity(name, values, [f"{value:,}" for value in values])

    sizes, epochs = [run.image[1:] for run in runs], [run.epochs for run in runs]
    encoders, flops = [run.encoder_parameters for run in runs], [run.training_flops for run in runs]
    yield _Quantity("image size", sizes, [f"{size[0]} x {size[1]}" for size in sizes], "differs")
    yield counted("channels", [run.image[0] for run in runs])
    yield _Quantity("data", [run.place for run in runs], [run.source for run in runs], "differs")
    yield counted("steps", [run.step for run in runs])
    yield _Quantity("epochs", epochs, [f"{number:.3g}" for number in epochs])
    yield counted("images seen", [run.images_seen for run in runs])
    texts = ["unknown" if number is None else f"{number:.3g} FLOPs" for number in flops]
    yield _Quantity("training compute", flops, texts, "differs")
    yield _Quantity("parameters of the encoder", encoders, [f"{number / 1e6:.2f} M" for number in encoders])


def _differ(values: Sequence[Any]) -> bool:
    if None in values:
        return False
    if all(isinstance(value, int | float) for value in values):
        return max(values) - min(values) > SAME_WITHIN * max(values)
    return any(value != values[0] for value in values)


def caveat(differing: Mapping[str, str]) -> str:
    """Return a text, appended to rankings, about quantities in which the runs differ; "" if they do not differ."""
    return f"; not a pure comparison of methods: the runs also differ in {', '.join(differing)}" if differing else ""


def image_flops(config: Config, images: ImageSpec) -> ImageFlops:
    """Count the FLOPs of one image; see `engine.flops`."""
    if config.method.name != ENCODER:
        flops = count_flops(config, images)
        return ImageFlops(**vars(flops), forward=flops.forward)
    encoder = build_unallocated(config, images).encoder
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(example_batch(images, 1, "meta").images)
    return ImageFlops(whole=counter.get_total_flops())


def _changed_settings(config: Config) -> list[str]:
    """Return the settings that differ from the recipe, as KEY=VALUE; [] if this version does not have the recipe."""
    if config.recipe not in (known := all_recipes()):
        return []
    base, changed = known[config.recipe](), []
    both = [key for key in keys(config) if key in set(keys(base)) and key not in ("data.source", "graft")]
    for key in both:
        value, default = (_value(tree, key) for tree in (config, base))
        if value != default:
            changed.append(f"{key}={value}")
    return [
        *changed,
        *(f"{entry.target or 'all weights'} from {entry.run}, step {entry.step}" for entry in config.graft),
    ]


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def _device(run: Run, plan: Plan) -> str:
    machine = run.read_if_present(PROVENANCE).get("device")
    return f"{plan.precision} on {plan.device}" + (f" ({machine})" if machine else "")
