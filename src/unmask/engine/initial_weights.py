"""Convert options that refer to other runs or files to settings: initial weights, a tokenizer, a palette, patch masks.

The resulting settings and `Graft` entries (copied before step 0) are stored in the run's config.json, which therefore
records the origin of all weights. Runs of the wrong kind are rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from unmask.batch import ImageSpec
from unmask.config import ENCODER, Config, ConfigError, Graft, parse
from unmask.data.files.patch_mask_file import hidden_share, read_masks
from unmask.engine import checkpoint
from unmask.engine.load import licence_of, read_config, read_plan, take_weights
from unmask.errors import UserError
from unmask.recipes import catalogue
from unmask.run import Run
from unmask.system.json_input import LARGEST, Outside, checked, read_json


class PaletteFile(Outside):
    """The contents of a file of `unmask palette` that training uses. colours: (k, C) in the files' units."""

    colours: Annotated[list[Annotated[list[float], Field(min_length=1, max_length=64)]], Field(
        min_length=2, max_length=LARGEST
    )]  # fmt: skip
    dtype: Literal["uint8", "uint16", "float32"]


TOKENIZER = "target.tokenizer."  # Prefix of the tokenizer's tensors in methods that predict codes.
DVAE = ""  # Prefix of the same tensors in a dVAE run, which has no other tensors.


def continued(from_run: str | Path, recipe: str) -> Config:
    """Return the configuration of a run that starts from the weights of another run.

    With recipe "auto", the settings and all weights of the other run are used. With a named recipe, only the encoder of
    the other run is used. In both cases the normalisation of the other run is used as well. Raises UserError if
    `from_run` is not a run, or has no checkpoint.
    """
    run = Run.open(from_run)
    step, _ = checkpoint.load_model(run)
    spec, whole = read_plan(run).images, recipe == "auto"
    config = read_config(run) if whole else catalogue.find(recipe)
    if config.method.name == ENCODER:
        raise ConfigError(
            f"--from {from_run} contains an encoder only, without a training method; choose one with --recipe NAME, "
            "such as mae_base (`unmask recipes` lists them)"
        )
    part = "" if whole else "encoder."
    data: dict[str, Any] = {"size": spec.size, "channels": spec.channels, "mean": spec.mean, "std": spec.std}
    data |= config.data.decided_settings(read_plan(run).reading)
    taken = Graft(run=str(run.path.absolute()), source=part, target=part, step=step)
    return config.model_copy(update={"data": config.data.model_copy(update=data), "graft": (taken,)})


def licence(config: Config) -> dict[str, str]:
    """Return the licence of the initial weights as an entry for provenance.json, or {} if no licence is known."""
    runs = [Run(entry.run) for entry in config.graft if not entry.target.startswith(TOKENIZER)]
    licences = dict.fromkeys(words for run in runs if (words := licence_of(run)))
    return {"licence": "; ".join(licences)} if licences else {}


def require_size(config: Config) -> None:
    """Raise ConfigError if the image size is not a multiple of the patch size of the initial weights."""
    patch = config.method.encoder.patch_size
    if not config.graft or patch is None:
        return
    for side, length, step in zip(("height", "width"), config.data.size, patch, strict=True):
        if length % step:
            near = [str(n) for n in (length // step * step, (length // step + 1) * step) if n]
            raise ConfigError(
                f"image {side} {length} is not a multiple of patch size {step} of the initial weights; use "
                f"{' or '.join(near)}"
            )


def with_tokenizer(path: str | Path, others: Iterable[Graft]) -> list[str]:
    """Return settings, as KEY=VALUE, to predict the codes of the dVAE run `path`.

    Raises UserError if that run is not a dVAE or has no checkpoint, or if the settings already contain a tokenizer.
    """
    run = Run.open(path)
    config = read_config(run)
    if config.method.name != "dvae":
        raise ConfigError(
            f"--tokenizer {path} is a run of {config.method.name}; expected the run of a dVAE: train one with "
            "`unmask pretrain DATA --recipe dvae_nano --out runs/tokenizer` and give --tokenizer runs/tokenizer"
        )
    if any(TOKENIZER.startswith(entry.target) for entry in others):
        raise ConfigError(
            "got both --from and --tokenizer, but the run of --from keeps its own tokenizer; leave "
            "--tokenizer out, or name a --recipe to take the encoder only"
        )
    step, _ = checkpoint.load_model(run)
    network = config.method.model_dump(mode="json")["encoder"]
    graft = Graft(run=str(run.path.absolute()), source=DVAE, target=TOKENIZER, step=step)
    grafts = [entry.model_dump(mode="json") for entry in (*others, graft)]
    return [f"method.tokenizer={json.dumps(network)}", f"graft={json.dumps(grafts)}"]


def with_masks(path: str | Path) -> list[str]:
    """Return settings, as KEY=VALUE, to use the patch masks of a file. Raises UserError if the file cannot be read."""
    patterns = read_masks(path)
    return [
        "method.mask=pattern",
        f"method.pattern={json.dumps(patterns)}",
        f"method.mask_ratio={hidden_share(patterns)!r}",
    ]


def with_palette(path: str | Path) -> list[str]:
    """Return settings, as KEY=VALUE, for an iGPT with the colours of a palette file or of another iGPT run.

    Raises UserError if the run is not an iGPT, or the file is not a palette.
    """
    path = Path(path)
    if path.is_dir():
        run = Run.open(path)
        method = read_config(run).method.name
        if method != "igpt":
            raise ConfigError(
                f"--palette {path} is a run of {method}; expected the run of an iGPT or a file of `unmask palette`: "
                f"make one with `unmask palette DATA`"
            )
        colours = checkpoint.load_model(run)[1]["encoder.palette"].tolist()
        dtype = read_plan(run).images.dtype
    else:
        if not path.exists():
            raise UserError(f"palette file {path} does not exist; make one with `unmask palette DATA`")
        where = f"palette file {path}"
        found = checked(PaletteFile, read_json(path), where, "make one with `unmask palette DATA`")
        colours, dtype = found.colours, found.dtype
        if len({len(colour) for colour in colours}) != 1:
            raise UserError(f"{where}: its colours have different numbers of channels; make one with `unmask palette`")
    return [
        f"method.palette={json.dumps(colours)}",
        f"method.palette_dtype={dtype}",
        f"method.encoder.colours={len(colours)}",
    ]


def require_own_settings(option: str, filled: Iterable[str], settings: Iterable[str], config: Config) -> None:
    """Raise ConfigError if --set also sets the settings of an option, or if the method does not have these settings."""
    asked, keys = parse(settings), [key for key in parse(filled) if key != "graft"]
    if both := sorted(set(asked) & set(keys)):
        raise ConfigError(f"got both {option} and {both[0]}, which set the same; leave one of them out")
    known = config.model_dump()["method"]
    if missing := [key.removeprefix("method.") for key in keys if key.split(".")[1] not in known]:
        raise ConfigError(
            f"{option} was given, but {config.method.name} has no setting {missing[0]}, so it would be ignored; leave "
            "it out, or choose another --recipe"
        )


def require_tokenizer(config: Config) -> None:
    """Raise ConfigError if a tokenizer is set without a run to copy its weights from."""
    if not config.method.has_tokenizer:
        return
    if not any(TOKENIZER.startswith(entry.target) for entry in config.graft):
        raise ConfigError(
            "got method.tokenizer without weights for it; give the run of a trained dVAE instead: --tokenizer RUN"
        )


def require_grafts(config: Config, images: ImageSpec) -> None:
    """Copy the initial weights to a temporary method, so that errors are reported before a run is created."""
    for entry in config.graft:
        run = Run.open(entry.run)
        theirs = read_plan(run).images
        option = "--tokenizer" if entry.target == TOKENIZER else "--from"
        if theirs.dtype != images.dtype:
            raise UserError(
                f"got {images.dtype} images; expected {theirs.dtype}, as in the training of {entry.run}, whose "
                f"normalisation is used; convert the images, or train without {option}"
            )
        if theirs.channels != images.channels:
            raise UserError(
                f"got images of {images.channels} channels; expected {theirs.channels}, as in the training of "
                f"{entry.run}; convert the images, set data.channels={theirs.channels}, or train without {option}"
            )
    if config.graft:
        take_weights(config.build(images), config)
