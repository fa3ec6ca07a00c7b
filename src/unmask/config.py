"""The root `Config`: all settings of a run. Values that are derived from the settings are in the `Plan`
(`engine/training_plan.py`).

A tree of frozen, typed models: unknown keys are errors, every model converts to JSON and back, and `--set KEY=VALUE`
can change every field. A method's name is the name of its file in `methods/`, or in `tasks/` if it learns from labels;
there is no registry. The name `encoder` denotes imported weights without a method (`encoder_only.py`).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveFloat, SerializeAsAny, ValidationError

import unmask.methods
import unmask.tasks
from unmask import encoder_only
from unmask.batch import ImageSpec
from unmask.data.augment import CropConfig
from unmask.data.decode.reading import Reading
from unmask.errors import UserError, nearest
from unmask.method import Method, MethodConfig
from unmask.nn.vit import Pair
from unmask.optim import OptimConfig
from unmask.settings import Settings
from unmask.task import Task

COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("optim.base_lr",),
    "learning_rate": ("optim.base_lr",),
    "blr": ("optim.base_lr",),
    "min_lr": ("optim.final_lr",),
    "wd": ("optim.weight_decay",),
    "warmup_epochs": ("optim.warmup",),
    "warmup_steps": ("optim.warmup",),
    "clip_grad": ("optim.clip",),
    "grad_clip": ("optim.clip",),
    "ema": ("optim.average",),
    "optimizer": ("optim.name",),
    "bs": ("train.batch_size",),
    "batch": ("train.batch_size",),
    "max_steps": ("train.steps",),
    "iterations": ("train.steps",),
    "num_epochs": ("train.epochs",),
    "max_epochs": ("train.epochs",),
    "accum_iter": ("train.micro_batch",),
    "amp": ("train.precision",),
    "dtype": ("train.precision",),
    "img_size": ("data.size",),
    "image_size": ("data.size",),
    "input_size": ("data.size",),
    "resolution": ("data.size",),
    "crop_size": ("data.size",),
    "num_workers": ("data.workers",),
    "patch_size": ("method.encoder.patch",),
    "embed_dim": ("method.encoder.width",),
    "hidden_size": ("method.encoder.width",),
    "num_heads": ("method.encoder.heads",),
    "num_layers": ("method.encoder.depth",),
    "norm_pix_loss": ("method.target",),
    "masking_ratio": ("method.mask_ratio",),
}
"""Names of settings in other programs, with the names that unmask uses."""


ENCODER = "encoder"
"""The method name of imported weights without a known method."""


class ConfigError(UserError):
    """Raised for an unknown setting or an invalid value, with the names of similar settings."""


class DataConfig(Settings):
    """Which images to use, and how to make batches of them.

    source: folder, list file, glob, tar, zip, parquet or the name of a built-in data set, or several of these.
    exclude: patterns of file names to leave out.
    size: (H, W) of the images that the method gets, in pixels.
    channels, mean, std: number of channels, and mean and standard deviation of each in the files' units (None:
    determined from the data).
    workers: number of decoding processes (None: chosen for the machine).
    cache: whether to keep decoded images in memory (None: if they fit in `cache_gib`).
    max_bad_fraction: maximum share of unreadable files; with more, the run stops.
    scan_sample: number of files to check before training, evenly spaced (None: all). If a file that was not checked
    turns out to be unreadable during training, it is recorded and replaced by another image.
    repeats: number of samples per decoded image, each with its own crop and mask, so that every file is decoded in only
    one of `repeats` epochs. train.batch_size must be a multiple of this number.
    resize: whether the loader's processes or the device resample training crops. Resampling on the device is faster for
    packed or large images, and slower for small images, because more bytes are copied. Both give the same crops up to
    rounding. test: the test images of a supervised run (None: some images of `source` are held out).
    nodata: which pixels are absent. Mean, standard deviation and loss ignore absent pixels, which are filled with the
    mean. With "auto", pixels with the value that a TIFF declares (GDAL_NODATA) are absent, and so are NaN and infinity
    in float images. With a number, pixels with that value are absent too, in files that declare no such value. With
    None, no pixel is absent.
    min_valid: minimum share of valid pixels in a patch; the loss ignores patches with less.
    annotations, test_annotations: location of the masks or boxes for segmentation or detection (None: beside the
    images).
    test_split: list of the test images.
    alpha: whether to composite an alpha channel on white, drop it, or keep it as a band. With "auto", alpha is
    composited, but a TIFF's band that is only tagged as alpha is kept.
    pages: whether to read a TIFF's first page, its pages as channels of one image, or each page as an image
    ("samples"). With "auto", the full resolution of a pyramid is read, and pages are channels if ImageJ or OME metadata
    describes them as such.
    axes: order of the axes of a three-dimensional .npy file; with "auto" it is guessed from the shape.
    held_out: number of evenly spaced images that pre-training holds out to measure a held-out loss (None: 1 % of the
    images, at least 64 and at most 256, if there are 1,000 images or more). Supervised runs hold out test images
    instead.
    """

    source: str | tuple[str, ...] = ""
    exclude: tuple[str, ...] = ()
    test: str | None = None
    annotations: str | None = None
    test_annotations: str | None = None
    test_split: str | None = None
    size: Pair = (224, 224)
    crop: CropConfig = CropConfig()
    channels: int | None = Field(default=None, gt=0)
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    workers: int | None = Field(default=None, ge=0)
    cache: bool | None = None
    cache_gib: float = Field(default=1.0, ge=0)
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    scan_sample: int | None = Field(default=20_000, gt=0)
    held_out: int | None = Field(default=None, ge=0)
    repeats: int = Field(default=1, gt=0, le=4096)
    resize: Literal["loader", "device"] = "loader"
    nodata: Literal["auto"] | float | None = "auto"
    min_valid: float = Field(default=0.5, gt=0, le=1)
    alpha: Literal["auto", "composite", "drop", "band"] = "auto"
    pages: Literal["auto", "first", "channels", "samples"] = "auto"
    axes: Literal["auto", "HWC", "CHW"] = "auto"

    @property
    def reading(self) -> Reading:
        """How to decode image files, with "auto" for options that are not set."""
        return Reading(alpha=self.alpha, pages=self.pages, axes=self.axes, nodata=self.nodata)

    def decided_settings(self, reading: Reading) -> dict[str, str]:
        """Return settings that decode other images as a run did, with the run's decisions in place of "auto"."""
        settings: dict[str, str] = {}
        if self.alpha == "auto" and reading.tagged != "auto":
            settings["alpha"] = "band" if reading.tagged == "band" else "composite"
        if self.axes == "auto" and reading.axes in ("HWC", "CHW"):
            settings["axes"] = reading.axes
        return settings

    @property
    def place(self) -> str:
        """The value of `source` as one text, for messages."""
        return self.source if isinstance(self.source, str) else ", ".join(self.source)


class TrainConfig(Settings):
    """Length of the training, and how often to log, test and write checkpoints and pictures.

    steps: number of optimiser steps; takes precedence over `epochs`.
    batch_size: images per optimiser step, over all micro-batches.
    micro_batch: images per forward pass (None: as many as fit in memory).
    precision: "auto" is bf16 if the processor is fast at it, else fp32.
    compile: whether to compile the transformer blocks. Compiling takes half a minute or more at the start, and needs a
    C++ compiler on a CPU.
    parallel: how several processes divide the work. "ddp": each holds the whole model; "fsdp": model, gradients and
    moments are divided among all processes; "hsdp": they are divided among the processes of each node. "auto" is ddp
    if that fits in memory. It has no effect in a single process.
    recompute: whether to recompute the activations of each transformer block in the backward pass instead of keeping
    them, which saves memory and costs about a third more computation.
    checkpoint_every, checkpoint_minutes: number of steps and minutes after which the next checkpoint is written.
    checkpoint_format: "dense": one process writes all weights; "dcp": each process writes a file with the part of the
    weights that it holds. "auto" is dcp with fsdp and hsdp, else dense. All commands read both.
    picture_images: images in each picture, at most 64.
    test_every: number of steps between tests of a supervised run (None: ten tests in all).
    """

    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=256, gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool = False
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    recompute: bool = False
    log_every: int = Field(default=10, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    checkpoint_minutes: float = Field(default=10, gt=0)
    checkpoint_format: Literal["auto", "dense", "dcp"] = "auto"
    keep_checkpoints: int = Field(default=2, ge=2)
    picture_every: int | None = Field(default=None, gt=0)
    picture_images: int = Field(default=8, gt=0, le=64)
    test_every: int | None = Field(default=None, gt=0)


class Graft(Settings):
    """Initial weights: copy all tensors under the prefix `source` of another run to the prefix `target`.

    Names and shapes must match. The weights are copied before step 0. A run that is resumed from a checkpoint does not
    read the other run again, but a run without a checkpoint does.

    run: folder of the other run.
    step: step of the checkpoint (None: the newest).
    """

    run: str
    source: str
    target: str
    step: int | None = None


class Config(Settings):
    """All settings of a run. recipe: the name of the recipe whose settings the run started from."""

    recipe: str = ""
    method: SerializeAsAny[Annotated[MethodConfig, BeforeValidator(lambda value: parse_method(value))]]
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    graft: tuple[Graft, ...] = ()

    def build(self, images: ImageSpec) -> Method:
        """Build the method for these images, with weights from torch's current generator."""
        return method_class(self.method.name)(self.method, images)


def method_names() -> list[str]:
    """Return the names of the files of `methods/`."""
    return sorted(module.name for module in pkgutil.iter_modules(unmask.methods.__path__))


def task_names() -> list[str]:
    """Return the names of the files of `tasks/`: methods that learn from labels, with another run's encoder."""
    return sorted(module.name for module in pkgutil.iter_modules(unmask.tasks.__path__))


def method_module(name: str) -> ModuleType:
    """Return the module of a method or task, or of `encoder`.

    Raises ConfigError with similar names for unknown names.
    """
    if name == ENCODER:
        return encoder_only
    if name in task_names():
        return importlib.import_module(f"unmask.tasks.{name}")
    if name not in method_names():
        raise ConfigError(f"method {name!r} is not known; {nearest(name, method_names())}")
    return importlib.import_module(f"unmask.methods.{name}")


def method_class(name: str) -> type[Method]:
    """Return the subclass of `Method` that the file of this name defines."""
    module = method_module(name)
    found = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Method) and thing.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define one Method, but it defines {len(found)}"
    return found[0]


def task_class(name: str) -> type[Task[Any, Any]]:
    """Return the task that the file `tasks/<name>.py` defines. Raises ConfigError if there is no such task."""
    if name not in task_names():
        raise ConfigError(f"got task {name!r}; expected one of {', '.join(task_names())}")
    found = method_class(name)
    assert issubclass(found, Task), f"{found.__module__} must define a subclass of Task"
    return found


def parse_method(value: Any) -> Any:
    """Parse a method's settings from JSON, with the `Config` of the file that `name` selects."""
    if not isinstance(value, dict):
        return value
    return method_module(str(value.get("name", ""))).Config.model_validate(value)


def nearest_setting(wrong: str, keys: Iterable[str]) -> str:
    """Return a hint for a wrong key of `--set`, such as 'did you mean optim.base_lr?', or the list of all keys."""
    return nearest(wrong, keys, COMMON_NAMES)


def keys(settings: BaseModel, prefix: str = "") -> list[str]:
    """Return all dotted keys that `--set` can change."""
    found: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        found += keys(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return found


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Return `config` with KEY=VALUE assignments applied, e.g. "train.steps=100" or "data.size=[48,64]".

    Values are parsed as JSON if possible and are text otherwise; `none` clears a field. Raises ConfigError for an
    unknown key, with similar keys, or for an invalid value, with the expected values.
    """
    tree = config.model_dump(mode="json")
    known = keys(config)
    for key, value in parse(assignments).items():
        if key not in known:
            raise ConfigError(f"{key!r} is not a setting; {nearest_setting(key, known)}")
        *path, leaf = key.split(".")
        branch = tree
        for part in path:
            branch = branch[part]
        branch[leaf] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """Return KEY=VALUE assignments as a dict, with None for cleared keys.

    If a key occurs twice, the last value counts.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"got {assignment!r}; expected KEY=VALUE, for example train.steps=1000")
        found[key.strip()] = _read(text.strip())
    return found


def _read(text: str) -> Any:
    try:
        return json.loads({"none": "null", "None": "null", "True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text


def explain(error: ValidationError) -> str:
    """Return a pydantic error as text: the name, value and expected value of each invalid setting."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        message = item["msg"].removeprefix("Value error, ")
        whole = isinstance(
            item["input"], dict | BaseModel
        )  # an error of several settings, which `message` names; `message` names them
        lines.append(f"{where}: {message}" if whole else f"{where}={item['input']!r} does not fit: {message}")
    return "; ".join(lines)
