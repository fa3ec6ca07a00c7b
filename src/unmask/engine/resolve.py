"""Settings of a run: combine a recipe with settings and options, and reject contradictions before any image is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from unmask.batch import ImageSpec
from unmask.config import ENCODER, Config, ConfigError, override, parse, task_names
from unmask.data.augment import crop_for
from unmask.data.sources.source import Source
from unmask.engine import initial_weights
from unmask.engine.image_size import candidates
from unmask.engine.load import read_config, read_plan
from unmask.engine.make_plan import choose_steps, require_micro_batch
from unmask.engine.measure import NO_TIME
from unmask.engine.time_budget import Budget
from unmask.errors import UserError
from unmask.recipes import catalogue
from unmask.run import Run

MOST_EPOCHS_A_STEP = 256
MOST_PATCHES = 1 << 18
SIZE_KEYS = ("data.size", "method.encoder.patch", "method.pattern")


class Facts(Protocol):
    """The facts about images from which settings are chosen; attributes as in `Scan`."""

    @property
    def usable(self) -> int: ...
    @property
    def median_size(self) -> tuple[int, int]: ...
    @property
    def sampled(self) -> bool: ...


def reject_two_sources_of_settings(recipe: str, from_run: str | Path | None) -> None:
    """Raise ConfigError if --config is given with --recipe or --from, which also select the settings."""
    if recipe != "auto" or from_run is not None:
        option = f"--recipe {recipe}" if recipe != "auto" else f"--from {from_run}"
        raise ConfigError(f"got both --config and {option}; both select the settings: leave one of them out")


def config_of_run(path: str | Path) -> Config:
    """Read the settings of an existing run (its folder or config.json), to start a new run on other images.

    If the run had a time budget, its number of steps is read from its plan. Raises RunError, ConfigError.
    """
    file = Path(path)
    run = Run.open(file.parent if file.name == "config.json" else file)
    config = read_config(run)
    reject_supervised(config, None)
    train, plan = config.train, read_plan(run)
    expected, _, _ = choose_steps(config, plan.num_images, budget=None, step_seconds=lambda: NO_TIME)
    if plan.steps and plan.steps != expected:
        train = train.model_copy(update={"steps": plan.steps, "epochs": None})
    data = config.data.model_copy(update={"source": ""})
    return config.model_copy(update={"data": data, "train": train})


def patch_of(config: Config) -> tuple[int, int] | None:
    """Return (H, W) of the encoder's patches in pixels, or None if it has no patches."""
    return config.method.encoder.patch_size


def settings_with_options(
    base: Config | None,
    recipe: str,
    settings: list[str],
    *,
    weights: bool = False,
    tokenizer: str | Path | None,
    palette: str | Path | None,
    masks: str | Path | None,
) -> list[str]:
    """Return `settings`, preceded by the settings that --tokenizer, --palette and --masks imply.

    base: configuration to use in place of a recipe (None: use the recipe). weights: whether `base` has weights
    (--from). Raises ConfigError if an option contradicts a setting, or if an option would be ignored.
    """
    if "graft" in parse(settings) and (weights or tokenizer is not None):
        option = "--from" if weights else "--tokenizer"
        raise ConfigError(f"got both {option} and graft; both select the initial weights: leave one of them out")
    if weights and palette is not None:
        raise ConfigError(
            "got both --from and --palette, but the weights of --from include their palette; leave --palette out"
        )
    config = base or catalogue.find(catalogue.AUTO[0] if recipe == "auto" else recipe)
    given = {
        "--masks": [] if masks is None else initial_weights.with_masks(masks),
        "--palette": [] if palette is None else initial_weights.with_palette(palette),
        "--tokenizer": [] if tokenizer is None else initial_weights.with_tokenizer(tokenizer, config.graft),
    }
    for option, filled in given.items():
        initial_weights.require_own_settings(option, filled, settings, config)
    return [*(text for filled in given.values() for text in filled), *settings]


def resolve_config(
    base: Config,
    settings: list[str],
    *,
    budget: Budget | None = None,
    proposals: Iterable[str] = (),
    source: Source | None = None,
) -> Config:
    """Return `base`, overridden by the proposals of `auto` and then by `settings`, for the images of `source`.

    A time budget overrides all settings of the length of the training, and epochs in `settings` override steps of
    `base` or of a proposal. Raises ConfigError for a setting that is invalid or would be ignored.
    """
    asked = parse(settings)
    reject_conflicts(asked, budget)
    steps = ["train.steps=none"] if asked.get("train.epochs") is not None else []
    config = override(base, [*proposals, *steps, *settings])
    if "data.crop.eval_share" not in asked:
        crop = crop_for(config.data.crop, config.data.size, base.data.size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"crop": crop})})
    if "train.test_every" in asked and config.method.name not in task_names():
        raise ConfigError(
            f"train.test_every was set, but a run of {config.method.name} is not tested on annotated images; leave it "
            "out"
        )
    ignored = sorted({"data.crop.scale", "data.crop.ratio"} & set(asked))
    if ignored and config.data.crop.kind != "random_resized":
        raise ConfigError(
            f"{ignored[0]} was set, but crops of kind {config.data.crop.kind!r} have a fixed size; set "
            "data.crop.eval_share, or data.crop.kind=random_resized, or leave it out"
        )
    if source is not None:
        where = {"source": source.data, "exclude": source.exclude}
        config = config.model_copy(update={"data": config.data.model_copy(update=where)})
    return config


def reject_conflicts(asked: dict[str, Any], budget: object) -> None:
    """Raise ConfigError for keys that cannot be set, and for two settings of the length of the training."""
    if "data.exclude" in asked:
        raise ConfigError("data.exclude cannot be set: give --exclude PATTERN to the command")
    if "data.source" in asked:
        raise ConfigError("data.source cannot be set: give the images as the DATA argument of the command")
    for key in ("data.test", "data.annotations", "data.test_annotations", "data.test_split"):
        if key in asked:
            option = key.removeprefix("data.").replace("_", "-")
            raise ConfigError(f"{key} cannot be set: give --{option} to `unmask finetune` instead")
    if "recipe" in asked:
        raise ConfigError("recipe cannot be set: choose one with --recipe NAME")
    wanted = [key for key in ("train.epochs", "train.steps") if asked.get(key) is not None]
    if budget is not None and wanted:
        raise ConfigError(f"got both a time budget and {wanted[0]}; leave one of them out")
    if len(wanted) > 1:
        raise ConfigError("got both train.steps and train.epochs; leave one of them out")


def draft_config(base: Config | None, recipe: str, settings: list[str], budget: Budget | None) -> Config:
    """Return the configuration before the images are known, and check that sizes, patches, heads and ratios are
    compatible.

    For the recipe `auto`, the settings must fit at least one of the recipes that `auto` chooses from. Raises
    ConfigError.
    """
    if base is not None or recipe != "auto":
        config = resolve_config(base or catalogue.find(recipe), settings, budget=budget)
        require_micro_batch(config)
        initial_weights.require_size(config)
        require_method(config)
        return config
    tries = [resolve_config(catalogue.find(name), settings, budget=budget) for name in catalogue.AUTO]
    faults = []
    for config in tries:
        try:
            require_method(_fit_size_and_patch(config, settings))
            return tries[0]
        except UserError as error:
            faults.append(error)
    raise faults[0]


def _fit_size_and_patch(config: Config, settings: list[str]) -> Config:
    """Return `config` with a fitting image size if only the patch was set, and vice versa."""
    asked = parse(settings)
    if "data.size" in asked and "method.encoder.patch" not in asked:
        divisors = [side for side in range(2, 17) if all(length % side == 0 for length in config.data.size)]
        return override(config, [f"method.encoder.patch={side}" for side in divisors[:1]])
    if "method.encoder.patch" in asked and "data.size" not in asked:
        height, width = config.model_dump()["method"]["encoder"]["patch"]
        return override(config, [f"data.size=[{height * 16},{width * 16}]"])
    return config


def reject_supervised(config: Config, from_run: str | Path | None) -> None:
    """Raise ConfigError for a method that cannot pre-train: a supervised method, or an imported encoder."""
    if config.method.name == ENCODER:
        raise ConfigError(
            "got the settings of an imported encoder, which has no training task; expected those of a pre-training "
            "run; to start from its weights: unmask pretrain DATA --from RUN --recipe mae_base"
        )
    if config.method.name not in task_names():
        return
    if from_run is None:
        raise ConfigError(
            f"recipe {config.recipe} learns from labels and cannot pre-train; use it with `unmask finetune RUN DATA "
            f"--recipe {config.recipe}`"
        )
    raise ConfigError(
        f"--from {from_run} is a run of {config.method.name}, which learns from labels; to train it further, use "
        f"`unmask finetune {from_run} DATA`; to pre-train its encoder, choose a --recipe"
    )


def require_method(config: Config) -> None:
    """Build the method without allocating weights, to reject settings that do not fit. Raises ConfigError."""
    initial_weights.require_tokenizer(config)
    reject_absurd_size(config)
    channels = config.data.channels or len(config.data.mean or config.data.std or (0, 0, 0))
    mean, std = config.data.mean or (0.0,) * channels, config.data.std or (1.0,) * channels
    require_statistics(channels, mean, std)
    with torch.device("meta"):
        config.build(ImageSpec(channels=channels, size=config.data.size, dtype="uint8", mean=mean, std=std))


def require_statistics(channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raise ConfigError unless there is one mean and one standard deviation per channel."""
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"got {len(mean)} means and {len(std)} standard deviations for {channels} channels; set data.mean=[...] "
            "and data.std=[...] with one number per channel, or leave both out"
        )


def reject_absurd_batch(config: Config, num_images: int) -> None:
    """Reject batch sizes far above the data set size, which are almost certainly typing errors. Raises ConfigError."""
    batch = config.train.batch_size
    if batch > MOST_EPOCHS_A_STEP * num_images:
        raise ConfigError(
            f"got train.batch_size={batch} for {num_images} images: every step would use each of them "
            f"{batch // num_images} times; use at most {MOST_EPOCHS_A_STEP * num_images}, 16 to 256 is usual"
        )


def reject_absurd_size(config: Config) -> None:
    """Reject numbers of patches that do not fit in any memory, which are almost certainly typing errors.

    Raises ConfigError.
    """
    height, width = config.data.size
    patch = config.method.model_dump().get("encoder", {}).get("patch") or (1, 1)
    patches = (height // patch[0]) * (width // patch[1])
    if patches > MOST_PATCHES:
        raise ConfigError(
            f"got data.size={[height, width]}, which is {patches:,} patches of {patch[0]} x {patch[1]} pixels; "
            f"expected at most {MOST_PATCHES:,} (196 is usual); use smaller images, or larger patches"
        )


def choose_config(
    source: Source | None,
    found: Facts,
    recipe: str,
    settings: list[str],
    device: str,
    *,
    budget: Budget | None,
) -> tuple[Config, tuple[str, ...], list[str]]:
    """Return the configuration, the reasons for choices that depend on the images, and these choices as KEY=VALUE.

    Keys in `settings` are never overridden. Raises ConfigError.
    """
    if recipe != "auto":
        return config_by_name(source, found, recipe, settings, budget=budget)
    asked = parse(settings)
    fixed = set(asked)
    if budget is not None or asked.get("train.epochs") is not None:
        fixed.add("train.steps")
    size = resolve_config(catalogue.find(catalogue.AUTO[0]), settings).data.size if "data.size" in fixed else None
    name, proposals, reasons = catalogue.choose(
        found.usable, found.median_size, device, fixed=fixed, size=size, about=found.sampled
    )
    config = resolve_config(catalogue.find(name), settings, budget=budget, proposals=proposals, source=source)
    return config, (f"recipe {name}, chosen by auto:", *reasons), proposals


def config_by_name(
    source: Source | None, found: Facts, recipe: str, settings: list[str], *, budget: Budget | None
) -> tuple[Config, tuple[str, ...], list[str]]:
    """Return the result of `choose_config` for a named recipe.

    Image size and patch size are chosen for the images unless one of them is set.
    """
    plain = resolve_config(catalogue.find(recipe), settings, budget=budget, source=source)
    if not set(SIZE_KEYS) & set(parse(settings)):
        for proposals in candidates(recipe, found.median_size):
            try:
                config = resolve_config(plain, proposals, budget=budget, source=source)
                require_method(config)
            except UserError:  # for example, the method's patch masks need a multiple of more patches
                continue
            reason = f"{' '.join(proposals)}: chosen for the images; recipe {recipe} has no fixed size"
            return config, (reason,), proposals
    return plain, (), []
