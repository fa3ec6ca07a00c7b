"""`unmask import FILE --out RUN`: weights that others made become a Run, which every verb then reads like our own.

What lies in a file or folder `interop/foreign/checkpoint_files.py` reads, and what it is `interop/foreign/recognise.py`
finds. Here it is fitted to the size and channels that were asked for, and written:

    another size       positions and relative position biases are interpolated in two dimensions, bicubic, corners not
                       aligned; the class token keeps its row
    1 channel          the projection of patches is summed over its channels, such that a gray image gives what it gave
                       with equal channels; with mean and std set by hand it is the plain sum
    C channels         the projection's channels are repeated in turn and scaled by 3 / C, mean and std are repeated

What cannot be had whole (another number of channels than MAE's decoder draws, BEiT without its tokenizer) becomes the
task `encoder`, and that is said. Images are 8 bits a channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError, DataConfig, explain, override, parse, parse_method, task_names
from unmask.console import Console
from unmask.data.augment import CropConfig, crop_for, protocol_share
from unmask.data.decode.reading import Reading
from unmask.engine import checkpoint, pretrain
from unmask.engine.load import read_config
from unmask.engine.plan import Plan
from unmask.errors import ForeignError, some
from unmask.interop.foreign.checkpoint_files import SAFE, Read, fingerprint, read_source
from unmask.interop.foreign.recognise import recognise
from unmask.interop.foreign.state_dicts import Recognised
from unmask.interop.safetensors_file import OwnFile, read_header
from unmask.method import Method
from unmask.nn import positions
from unmask.nn.patches import grid_of
from unmask.optim import OptimConfig
from unmask.run import CONFIG, PLAN, PROVENANCE, Run

RECIPE = "import"
OWN_BIAS = r"encoder\.blocks\.\d+\.relative_bias\.table"
UNSTATED = "your own, or whoever's run it was exported from; nothing is stated"
OPTIMS = {
    "beit": OptimConfig(base_lr=1.5e-3 / 8, betas=(0.9, 0.999), final_lr=1 / 150, clip=3.0),
    "classify": OptimConfig(base_lr=1e-3, betas=(0.9, 0.999)),
    "simmim": OptimConfig(base_lr=1e-4 * 256 / 512, betas=(0.9, 0.999), clip=5.0),
    "igpt": OptimConfig(base_lr=0.006, betas=(0.9, 0.95), weight_decay=0),
    "dvae": OptimConfig(base_lr=0.5e-4, betas=(0.9, 0.999), weight_decay=1e-4, warmup=0, final_lr=0.0125),
}
"""What `pretrain --from` goes on with; MAE's where there is none."""


def require_heads(found: Recognised, settings: Iterable[str]) -> Recognised:
    """The number of heads, which weights do not show: published, or set by hand. Raises ConfigError without one."""
    asked, method = parse(settings), dict(found.method)
    for part in ("encoder", "decoder"):
        if part not in method or (part == "encoder" and method["name"] == "dvae") or "heads" in method[part]:
            continue
        key, width = f"method.{part}.heads", method[part]["width"]
        heads = asked.get(key)
        if not isinstance(heads, int) or heads < 1 or width % heads:
            came = f"{key}={heads} came for" if key in asked else "nothing says how many heads share"
            raise ConfigError(
                f"{came} the width {width} of this {part}, and weights do not show it; give a divisor of {width} with "
                f"--set {key}=N (published networks have 64 values to a head, or 32)"
            )
        method[part] = {**method[part], "heads": heads}
    return replace(found, method=method)


def signed(found: Recognised, imprint: Mapping[str, Any]) -> Recognised:
    """What `unmask export` said of the Run beside its weights, in place of what would have to be assumed."""
    if imprint["shared_bias"]:
        found = with_shared_bias(found)
    method = dict(found.method)
    for part, heads in imprint["heads"].items():
        if part in method:
            method[part] = {**method[part], "heads": heads}
    notes = found.notes
    if method["name"] == "classify" and imprint["classes"]:
        method["classes"] = imprint["classes"]
    if method["name"] == "mae" and imprint["target"] in ("norm_pixels", "pixels"):
        method["target"] = imprint["target"]
        notes = tuple(note for note in notes if not note.startswith("the decoder is taken to predict"))
    return replace(
        found, method=method, notes=notes, kind=f"{found.kind}, exported by unmask", eval_share=imprint["eval_share"],
        mean=tuple(imprint["mean"]), std=tuple(imprint["std"]), statistics="of the run that it was exported from",
        licence=imprint["licence"] or UNSTATED,
    )  # fmt: skip


def with_shared_bias(found: Recognised) -> Recognised:
    """One relative position bias for all blocks again, where an export wrote the same for each."""
    tables = {name: value for name, value in found.weights.items() if re.fullmatch(OWN_BIAS, name)}
    if not tables or not all(torch.equal(value, next(iter(tables.values()))) for value in tables.values()):
        return found
    weights = {name: value for name, value in found.weights.items() if name not in tables}
    weights["encoder.relative_bias.table"] = next(iter(tables.values()))
    return replace(found, weights=weights, method=found.method | {
        "encoder": found.method["encoder"] | {"relative_bias": True}
    })  # fmt: skip


def arguments_read(read: Read) -> tuple[str, ...]:
    """Sentences: which arguments of the training were in the file and count, and which made no sense."""
    said = []
    if read.training:
        known = ", ".join(f"{name}={value!r}" for name, value in sorted(read.training.items()))
        said.append(f"read from the arguments of its training: {known}")
    if read.unclear:
        said.append(
            f"of the arguments of its training {', '.join(read.unclear)} make no sense and do not count; set what "
            "they decide with --set"
        )
    return tuple(said)


def as_encoder(found: Recognised, why: str) -> Recognised:
    """The encoder alone, as the task `encoder`; `why` is said."""
    weights = {name: value for name, value in found.weights.items() if name.startswith("encoder.")}
    method = {"name": "encoder", "encoder": found.method["encoder"]}
    return replace(found, method=method, weights=weights, notes=(*found.notes, why))


def settled(found: Recognised, settings: list[str], tokenizer: Path | None) -> Recognised:
    """What of the method can be had: all, or the encoder alone where something is missing for the rest."""
    asked, name = parse(settings), found.method["name"]
    channels = asked.get("data.channels", found.channels)
    if tokenizer is not None and name != "beit":
        raise ConfigError(
            f"--tokenizer {tokenizer} came, but this is {found.kind}, which predicts no codes; leave it out"
        )
    if name == "beit" and tokenizer is None:
        return as_encoder(
            found,
            "its head predicts the codes of a dVAE that is not in the file, so it is imported as an encoder only; for "
            "the whole method import that dVAE first and give --tokenizer RUN",
        )
    if channels == found.channels or not isinstance(channels, int) or name in ("encoder", "classify"):
        return found
    if name == "igpt":
        raise ConfigError(
            f"data.channels={channels} came, but the palette has colours of {found.channels} channels; leave it out"
        )
    if name == "dvae":
        raise ConfigError(
            f"data.channels={channels} came, but this dVAE draws {found.channels} channels; leave it out, or train one "
            "with `unmask pretrain DATA --recipe dvae_small`"
        )
    return as_encoder(
        found,
        f"the rest of the method is made for {found.channels} channels and not for {channels}, so the encoder alone is "
        "imported",
    )


def configure(found: Recognised, settings: list[str], origin: str) -> tuple[Config, ImageSpec]:
    """The settings that describe the weights, with a person's over them, and what the images are.

    Raises ConfigError for a setting that does not exist, or that the weights decide.
    """
    pretrain.refuse_conflicts(parse(settings), None)
    if "graft" in parse(settings):
        raise ConfigError("graft cannot be set: all weights come from what is imported; leave it out")
    method = {**found.method, "origin": origin} if found.method["name"] == "encoder" else found.method
    if found.grid is not None:
        size = found.grid[0] * found.patch[0], found.grid[1] * found.patch[1]
    elif "data.size" in parse(settings):
        size = DataConfig().size
    else:
        raise ConfigError(
            f"positions for {found.places} patches came, which are no square; say which images they are for with --set "
            "data.size=[HEIGHT,WIDTH]"
        )
    crop = CropConfig(eval_share=found.eval_share or protocol_share(size))
    try:
        base = Config(
            recipe=RECIPE,
            method=parse_method(method),
            data=DataConfig(size=size, crop=crop),
            optim=OPTIMS.get(found.method["name"], OptimConfig()),
        )
    except ValidationError as error:
        raise ConfigError(f"weights of {found.name}: {explain(error)}") from None
    config = override(base, settings)
    require_as_found(base, config)
    if found.eval_share is None and "data.crop.eval_share" not in parse(settings):
        crop = crop_for(config.data.crop, config.data.size, size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"crop": crop})})
    return with_statistics(found, config)


def require_as_found(base: Config, config: Config) -> None:
    """Raises ConfigError for a setting of the network other than what the weights are."""
    before, after = (tree.model_dump()["method"] for tree in (base, config))
    free = {"heads", "feature_layer", "norm_eps"} | ({"patch"} if "colours" in before["encoder"] else set())
    given = ("palette", "palette_dtype", "origin", "tokenizer")
    if changed := [key for key in given if before.get(key) != after.get(key)]:
        raise ConfigError(f"method.{changed[0]} cannot be set: it comes with the weights; leave it out")
    for part in ("encoder", "decoder"):
        theirs, ours = before.get(part) or {}, after.get(part) or {}
        for key, value in theirs.items():
            if ours.get(key) != value and key not in free:
                raise ConfigError(
                    f"method.{part}.{key}={ours.get(key)} was set, but the weights have {value}; leave it out: what is "
                    "imported cannot change its shape"
                )


def with_statistics(found: Recognised, config: Config) -> tuple[Config, ImageSpec]:
    """Channels, mean and standard deviation: by hand, else those of the weights, spread over the channels.

    Raises ConfigError where there are none: a normalisation is not made up.
    """
    channels = config.data.channels or found.channels
    mean, std = config.data.mean, config.data.std
    if found.mean is not None and found.std is not None:
        mean, std = mean or spread(found.mean, channels), std or spread(found.std, channels)
    if mean is None or std is None:
        raise ConfigError(
            f"these weights are for {found.channels} channels, for which no normalisation is published; give that of "
            "their training with --set data.mean=[...] and --set data.std=[...], in the files' units (0 to 255)"
        )
    pretrain.require_statistics(channels, mean, std)
    images = ImageSpec(channels, config.data.size, "uint8", tuple(mean), tuple(std))
    data = {"channels": channels, "mean": images.mean, "std": images.std}
    return config.model_copy(update={"data": config.data.model_copy(update=data)}), images


def spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A number per channel for other channels: the mean of all for one, else repeated in turn."""
    if channels == len(values):
        return values
    return (sum(values) / len(values),) if channels == 1 else tuple(values[i % len(values)] for i in range(channels))


def fitted(
    found: Recognised, config: Config, images: ImageSpec, *, by_hand: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights for images of this size and so many channels, and what was done to them, in sentences.

    by_hand: mean or std were set by a person, so they are not what the weights were trained with.
    """
    weights, said = dict(found.weights), []
    if images.channels != found.channels:
        weight, bias = (weights[f"encoder.patch_embed.proj.{leaf}"] for leaf in ("weight", "bias"))
        norms = None if by_hand or found.mean is None or found.std is None else (found.mean, found.std)
        weight, bias = other_channels(weight, bias, images, norms)
        weights |= {"encoder.patch_embed.proj.weight": weight, "encoder.patch_embed.proj.bias": bias}
        how = "summed over them" if images.channels == 1 else "repeated in turn and scaled"
        said.append(f"the projection of patches of {found.channels} channels is {how}, for {images.channels}")
    encoder: Any = config.method
    new = grid_of(images.size, encoder.encoder.patch)
    old = found.grid or new
    if found.places and old[0] * old[1] != found.places:
        raise ConfigError(
            f"data.size={list(images.size)} has {new[0]} x {new[1]} patches, but there are positions for "
            f"{found.places} and nothing says of which rectangle; give the size that the weights were trained at"
        )
    if old != new:
        moved = {name: positions.fitted(name, value, old, new) for name, value in weights.items()}
        if any(moved[name] is not weights[name] for name in weights):
            said.append(f"positions are interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
        weights = moved
    return weights, said


def other_channels(
    weight: Tensor, bias: Tensor, images: ImageSpec, norms: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> tuple[Tensor, Tensor]:
    """A patch projection (D, C, h, w) and its bias for other channels; see the module docstring.

    norms: mean and standard deviation per channel that the weights know; with them a gray image gives exactly what it
    gave with equal channels, although its one mean is another number.
    """
    before, after = weight.shape[1], images.channels
    if after > 1:
        return weight[:, [number % before for number in range(after)]] * (before / after), bias
    if norms is None:
        return weight.sum(1, keepdim=True), bias
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in norms)
    shift = ((images.mean[0] - mean) / std * weight.double()).sum((1, 2, 3))
    return (weight.double() * images.std[0] / std).sum(1, keepdim=True).float(), (bias.double() + shift).float()


def require_whole(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raises ForeignError, naming tensors, unless these are exactly the ones of the method, and finite."""
    missing, left = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    both = [(name, weights[name], value) for name, value in wanted.items() if name in weights]
    shapes = [
        f"{name} {tuple(found.shape)} instead of {tuple(value.shape)}"
        for name, found, value in both
        if found.shape != value.shape
    ]
    types = [
        f"{name} {found.dtype} instead of {value.dtype}"
        for name, found, value in both
        if found.is_floating_point() != value.is_floating_point()
    ]
    faults = {"missing": missing, "left over": left, "of another shape": shapes, "of another type": types}
    if any(faults.values()):
        named = "; ".join(f"{len(names)} {how}: {some(names)}" for how, names in faults.items() if names)
        raise ForeignError(
            f"{what} is not whole ({named}); the file is cut, a variant of this network, or two files were mixed"
        )
    if bad := [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ForeignError(
            f"{what} has numbers that are not finite, in {some(bad)}; the file is damaged, or its training failed"
        )


def import_weights(
    source: str | Path,
    out: str | Path,
    *,
    settings: Iterable[str] = (),
    tokenizer: str | Path | None = None,
    console: Console | None = None,
) -> Run:
    """Make a Run of the weights in a file or folder. settings: KEY=VALUE. tokenizer: the dVAE's Run, for a BEiT.

    Raises ValueError, before anything is written, for what is no such file, is not whole, or does not fit the settings.
    """
    console = console or Console()
    source, settings = Path(source), list(settings)
    Run.check_free(out)
    if source.suffix in SAFE and (own := read_header(source)) is not None:
        given = [*settings, *([] if tokenizer is None else ["--tokenizer"])]
        return import_own(own, out=out, given=given, console=console)
    read = read_source(source)
    try:
        found = recognise(read.state, read.about, read.look, read.training)
    except ForeignError as error:
        raise ForeignError(f"{source}: {error}") from None
    found = replace(found, notes=(*found.notes, *arguments_read(read)))
    console.say(f"{source}: {found.name}")
    if read.imprint:
        found = signed(found, read.imprint)
    found = require_heads(settled(found, settings, None if tokenizer is None else Path(tokenizer)), settings)
    if tokenizer is not None and found.method["name"] == "beit":
        found = with_tokenizer(found, Path(tokenizer))
    config, images = configure(found, settings, source.resolve().name)
    asked = parse(settings)
    by_hand = bool({"data.mean", "data.std"} & set(asked))
    weights, said = fitted(found, config, images, by_hand=by_hand)
    with torch.device("meta"):
        method = config.build(images)
    wanted = method.state_dict()
    weights |= {name: value for name, value in described(images).items() if name in wanted}
    require_whole(wanted, weights, f"{source}: {found.kind}")
    checkpoint.require_fit(method, weights, str(source))

    about = {"source": str(source.absolute()), "files": read.files, "kind": found.name, "licence": found.licence}
    reasons = (f"weights of {source.resolve().name}: {found.name}", *found.notes, *said)
    run = write_run(out, config, images, method, weights, reasons, about)
    say_imported(run, found, config, images, said, by_hand=by_hand, console=console)
    return run


def import_own(own: OwnFile, *, out: str | Path, given: list[str], console: Console) -> Run:
    """A Run of a file that `unmask export --to safetensors` wrote, which says itself what it is."""
    source, config = own.path, own.config
    if given:
        raise ConfigError(
            f"{given[0]} came, but {source} is an export of unmask and has its settings; import it as it is, finetune "
            "and `pretrain --from` can change them"
        )
    method, weights = own.read()  # under our own names, of which no prefix is to be taken off
    require_whole(method.state_dict(), weights, f"{source}: an export of unmask")
    name = f"an export of unmask: {config.method.name}, recipe {config.recipe}"
    files = [fingerprint(source)]
    about = {"source": str(source.absolute()), "files": files, "kind": name, "licence": own.licence or UNSTATED}
    config = config.model_copy(update={"graft": ()})
    run = write_run(out, config, own.images, method, weights, (f"weights of {source.name}: {name}",), about)
    console.say(f"{source}: {name}")
    console.say(f"{run.path}: {use_of(config.method.name)}")
    return run


def write_run(
    out: str | Path,
    config: Config,
    images: ImageSpec,
    method: Method,
    weights: dict[str, Tensor],
    reasons: tuple[str, ...],
    about: dict[str, Any],
) -> Run:
    """The Run of a method whose weights are all there; `about` says where they came from."""
    counts = [sum(p.numel() for p in part.parameters()) for part in (method, method.encoder)]
    plan = plan_of(config, images, counts, reasons)
    files = {
        CONFIG: config.model_dump(mode="json"),
        PROVENANCE: pretrain.provenance(plan) | {"imported": about},
        PLAN: plan.model_dump(mode="json"),
    }

    def fill(run: Run) -> None:
        checkpoint.check_space(run, sum(value.nbytes for value in weights.values()))
        fixed = {name: value for name, value in weights.items() if name.startswith(method.fixed)}
        if fixed:
            checkpoint.save_fixed(run, fixed)
        changing = {name: value.clone() for name, value in weights.items() if name not in fixed}
        checkpoint.save(run, 0, changing, {}, {"step": 0})

    with Run.begin(out, files, fill=fill) as run:
        run.set_status("finished", 0, total=0)
    return run


def with_tokenizer(found: Recognised, path: Path) -> Recognised:
    """A BEiT and the dVAE whose codes it predicts. Raises ConfigError for a run of another method."""
    run = Run.open(path)
    config: Any = read_config(run).method
    if config.name != "dvae":
        raise ConfigError(
            f"--tokenizer {path} is a run of {config.name}, the run of a dVAE was expected: import DALL-E's, or "
            "train one"
        )
    if config.encoder.codes != (codes := len(found.weights["head.weight"])):
        raise ConfigError(
            f"--tokenizer {path} has {config.encoder.codes} codes, this head predicts {codes}; give "
            "the dVAE that it was trained with, or leave it out"
        )
    _, network = checkpoint.load_model(run)
    weights = found.weights | {f"target.tokenizer.{name}": value for name, value in network.items()}
    return replace(found, method={**found.method, "tokenizer": config.encoder.model_dump()}, weights=weights)


def described(images: ImageSpec) -> dict[str, Tensor]:
    """What encoders keep of the images that they are for, by name."""
    low, high = images.value_range
    values = {"mean": images.mean, "std": images.std, "low": low, "high": high}
    return {f"encoder.{name}": torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def plan_of(config: Config, images: ImageSpec, counts: list[int], reasons: tuple[str, ...]) -> Plan:
    """The plan of a run that is finished at step 0: nothing was trained here, on no images."""
    return Plan(
        steps=0, warmup_steps=0, batch_size=config.train.batch_size, micro_batch=config.train.batch_size,
        accumulation=1, peak_lr=0.0, final_lr=0.0, epochs=0.0, num_images=0, images=images, fingerprint="",
        precision="fp32", device="cpu", workers=0, cached=False, picture_every=1, parameters=counts[0],
        encoder_parameters=counts[1], reasons=reasons, reading=Reading(),
    )  # fmt: skip


def say_imported(
    run: Run,
    found: Recognised,
    config: Config,
    images: ImageSpec,
    said: list[str],
    *,
    by_hand: bool,
    console: Console,
) -> None:
    """What it became, what was done to it, which normalisation was taken, and what one can do with it."""
    name = config.method.name
    for line in (*found.notes, *said):
        console.say(f"  {line}")
    share = config.data.crop.eval_share
    console.say(
        "  in evaluation it sees "
        + ("the largest box in the middle" if share == 1 else f"{share:.4g} of the shorter side, in the middle")
        + ", unless imported with --set data.crop.eval_share=SHARE"
    )
    for part, settings in (("encoder", found.method.get("encoder")), ("decoder", found.method.get("decoder"))):
        if settings and "heads" in settings:
            console.say(f"  {part}: {settings['heads']} heads of {settings['width'] // settings['heads']} values")
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (images.mean, images.std))
    if name != "igpt" and "colours" not in found.method["encoder"]:
        whose = "set by hand" if by_hand else found.statistics
        console.say(
            f"  normalisation: mean {mean}, std {std} ({whose}); if the weights were trained with another, import "
            "again with --set data.mean=[...] --set data.std=[...]"
        )
    console.say(f"  licence of the weights: {found.licence}")
    console.say(f"{run.path}: {use_of(name)}")


def use_of(method: str) -> str:
    """What one can do with a Run of this method."""
    if method == "encoder":
        return "embed, probe and finetune take it; to train on, name a --recipe with `unmask pretrain DATA --from`"
    if method in task_names():
        return f"fine-tuned to {method}: embed, predict, probe and finetune take it"
    return f"a whole {method}: embed, probe, reconstruct, finetune and `unmask pretrain DATA --from` take it"
