"""The root `Config`: all settings of a run. Values derived from them are in the `Plan` (`engine/plan.py`).

A tree of frozen, typed models: unknown keys are errors, JSON goes both ways, and `--set KEY=VALUE` reaches every field.
A method's name is the name of its file in `methods/`, or in `tasks/` if it learns from labels; there is no registry.
"""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveFloat, SerializeAsAny, ValidationError

import unmask.methods
import unmask.tasks
from unmask.batch import ImageSpec
from unmask.data.augment import CropConfig
from unmask.data.decode.reading import Reading
from unmask.errors import UserError
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
"""Names of settings in other programs, with the name here."""


class ConfigError(UserError):
    """An unknown setting or an invalid value; the message names the nearest settings."""


class DataConfig(Settings):
    """Which images, and how they become batches.

    source: folder, list file, glob, tar, zip, parquet or an embedded name, or several. exclude: patterns of names that
    are left out. size: (H, W) the method sees, in pixels.
    channels, mean, std: None means counted and computed on the data (mean and std in the files' own units).
    workers: decoding processes; None means chosen from the machine. cache: keep decoded images in memory; None means if
    they fit in `cache_gib`. max_bad_fraction: more unreadable files than this stop the run. scan_sample: files that are
    checked before training, evenly spread, None for all; a bad file that was not among them is met, noted and replaced
    when its turn comes. repeats: samples that every image gives when it is read, one after the other and each with its
    own crop and mask, so that files are decoded in one of so many epochs only; train.batch_size is a multiple. resize:
    who resamples training crops, the loader's processes or the device; the device pays for images that were packed or
    are large, and not for small ones, of which more bytes travel than the resampling is worth. The crops are the same,
    and their pixels but for rounding. test: other images that a supervised run is tested on; None where they are held
    out of source.
    nodata: which pixels are absent: they do not count in mean, std and loss, and images hold the mean there. "auto":
    those with the value that a TIFF declares (GDAL_NODATA), and NaN or infinity in float images; a number: those with
    that value as well, for files that declare none; none: no pixel. min_valid: share of valid pixels that a patch needs
    to count in the loss.
    annotations, test_annotations: where the masks or boxes of a segmentation or detection are, None for beside the
    images; test_split: the list of test images.
    alpha: what becomes of an alpha channel: composite it on white, drop it, or keep it as a band; auto composites, but
    keeps a TIFF's band that is only tagged as alpha. pages: of a TIFF, the first, or its pages as channels of one
    image, or each page as an image (samples); auto reads the full resolution of a pyramid, and pages as channels where
    ImageJ or OME metadata says so. axes: the order of the axes of a three-dimensional .npy; auto guesses if it must.
    held_out: images kept out of pre-training, evenly spread, on which the loss is reported too; None for one in a
    hundred, but 64 to 256, of 1,000 images or more. Supervised runs hold out test images instead.
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
        """How to decode image files; unset options stay "auto"."""
        return Reading(alpha=self.alpha, pages=self.pages, axes=self.axes, nodata=self.nodata)

    def as_settled(self, reading: Reading) -> dict[str, str]:
        """Settings to read other images like those of a run, with the run's decisions in place of `auto`."""
        found: dict[str, str] = {}
        if self.alpha == "auto" and reading.tagged != "auto":
            found["alpha"] = "band" if reading.tagged == "band" else "composite"
        if self.axes == "auto" and reading.axes in ("HWC", "CHW"):
            found["axes"] = reading.axes
        return found

    @property
    def place(self) -> str:
        """`source` as one text, for messages."""
        return self.source if isinstance(self.source, str) else ", ".join(self.source)


class TrainConfig(Settings):
    """How long and how often. `steps` are optimiser steps and win over `epochs`; `batch_size` is global.

    micro_batch: images per forward pass; None means as many as fit in memory. compile: the transformer blocks, which
    takes half a minute or more at the start, and on a CPU a C++ compiler. checkpoint_every is in steps, and a
    checkpoint is also written every `checkpoint_minutes`. precision "auto" is bf16 where the processor is fast at it.
    picture_images: images in each picture, at most 64. test_every: steps after which a supervised run is tested, None
    for ten times in all.
    """

    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=256, gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool = False
    log_every: int = Field(default=10, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    checkpoint_minutes: float = Field(default=10, gt=0)
    keep_checkpoints: int = Field(default=2, ge=2)
    picture_every: int | None = Field(default=None, gt=0)
    picture_images: int = Field(default=8, gt=0, le=64)
    test_every: int | None = Field(default=None, gt=0)


class Graft(Settings):
    """Start from other weights: copy the Run's tensors under the prefix `source` to the prefix `target`, strictly.

    step: of the checkpoint, None for the newest. Done before step 0. A run that is resumed after its first checkpoint
    does not read the other Run; one that was stopped earlier still needs it.
    """

    run: str
    source: str
    target: str
    step: int | None = None


class Config(Settings):
    """All settings of a run. recipe: the name of the recipe it started from."""

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
    """Return the names of the files of `tasks/`: methods that learn from labels, on another Run's encoder."""
    return sorted(module.name for module in pkgutil.iter_modules(unmask.tasks.__path__))


def method_module(name: str) -> ModuleType:
    """`methods/<name>.py` or `tasks/<name>.py`. Raises ConfigError with the nearest names when there is neither."""
    if name in task_names():
        return importlib.import_module(f"unmask.tasks.{name}")
    if name not in method_names():
        raise ConfigError(f"method {name!r} is not known; {nearest(name, method_names())}")
    return importlib.import_module(f"unmask.methods.{name}")


def method_class(name: str) -> type[Method]:
    """Return the one subclass of `Method` that the file of this name defines."""
    module = method_module(name)
    found = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Method) and thing.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define one Method, it defines {len(found)}"
    return found[0]


def task_class(name: str) -> type[Task[Any, Any]]:
    """Return the task that the file `tasks/<name>.py` defines. Raises ConfigError where there is none."""
    found = method_class(name) if name in task_names() else None
    if found is None or not issubclass(found, Task):
        raise ConfigError(f"got task {name!r}; expected one of {', '.join(supervised_names())}")
    return found


def supervised_names() -> list[str]:
    """Return the names of all tasks that learn from annotations."""
    return [name for name in task_names() if issubclass(method_class(name), Task)]


def parse_method(value: Any) -> Any:
    """A method's settings from JSON: `name` selects the file whose `Config` parses them."""
    if not isinstance(value, dict):
        return value
    return method_module(str(value.get("name", ""))).Config.model_validate(value)


def nearest(wrong: str, names: Iterable[str]) -> str:
    """Return 'did you mean a or b?', or the list of all names when none is similar."""
    names = list(names)
    leaves = {name.split(".")[-1]: name for name in names}
    leaf = wrong.split(".")[-1].lower().replace("-", "_")
    close = [name for name in COMMON_NAMES.get(leaf, ()) if name in names]
    close += difflib.get_close_matches(wrong, names, 3, 0.6)
    close += [leaves[near] for near in difflib.get_close_matches(leaf, leaves, 3, 0.75)]
    close = list(dict.fromkeys(close))[:3]
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}"


def keys(settings: BaseModel, prefix: str = "") -> list[str]:
    """Return every dotted key that `--set` can change."""
    found: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        found += keys(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return found


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Return `config` with KEY=VALUE assignments applied, e.g. "train.steps=100" or "data.size=[48,64]".

    Values are read as JSON where they are JSON and as text otherwise; `none` clears a field. Raises ConfigError for a
    key that does not exist (naming the nearest ones) or an invalid value (naming the expected ones).
    """
    tree = config.model_dump(mode="json")
    known = keys(config)
    for key, value in parse(assignments).items():
        if key not in known:
            raise ConfigError(f"{key!r} is not a setting; {nearest(key, known)}")
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
    """Return KEY=VALUE assignments as key -> value, None for a cleared one; the last one of a key counts."""
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
    """Return a pydantic error as one sentence per setting: its name, the value, and the expected value."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        message = item["msg"].removeprefix("Value error, ")
        whole = isinstance(item["input"], dict | BaseModel)  # incompatible settings; the message names them
        lines.append(f"{where}: {message}" if whole else f"{where}={item['input']!r} does not fit: {message}")
    return "; ".join(lines)
