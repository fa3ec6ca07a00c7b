"""`unmask import FILE --out RUN`: create a run from the weights of another library.

Files are read by `interop/foreign/checkpoint_files.py`, identified by `interop/foreign/recognise.py`, and fitted to the
image size and channels of the settings by `interop/fit_weights.py`. If a method cannot be imported completely (such as
a BEiT without its tokenizer), only its encoder is imported, as the task `encoder`, and a note is printed. The images of
an imported run have 8 bits per channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unmask.config import ConfigError, parse
from unmask.console import Console
from unmask.engine import checkpoint, copy_weights
from unmask.engine.load import read_config
from unmask.errors import ForeignError
from unmask.interop.fit_weights import described, fitted, require_whole
from unmask.interop.foreign.checkpoint_files import SAFE, Checkpoint, fingerprint, read_source
from unmask.interop.foreign.recognise import recognise
from unmask.interop.foreign.state_dicts import Recognised
from unmask.interop.import_settings import UNSTATED, choose_method, configure, require_heads, with_export_metadata
from unmask.interop.imported_run import ImportedModel, report_import, use_of, write_run
from unmask.interop.safetensors_file import OwnFile, read_header
from unmask.run import Run


def describe_arguments(read: Checkpoint) -> tuple[str, ...]:
    """Return notes about the training arguments: the ones that are used, and the ones with invalid values."""
    notes = []
    if used := read.metadata.training.model_dump(exclude_none=True):
        known = ", ".join(f"{name}={value!r}" for name, value in sorted(used.items()))
        notes.append(f"used training arguments from the file: {known}")
    if read.unclear:
        notes.append(
            f"training arguments with invalid values are ignored: {', '.join(read.unclear)}; give the correct "
            "settings with --set"
        )
    return tuple(notes)


def import_weights(
    source: str | Path,
    out: str | Path,
    *,
    settings: Iterable[str] = (),
    tokenizer: str | Path | None = None,
    console: Console | None = None,
) -> Run:
    """Create a run from the weights in a file or folder.

    settings: KEY=VALUE. tokenizer: run of the dVAE that a BEiT was trained with. Raises UserError, before anything is
    written, if the file is not a checkpoint, is incomplete, or contradicts the settings.
    """
    console = console or Console()
    source, settings = Path(source), list(settings)
    Run.check_free(out)
    if source.suffix in SAFE and (own := read_header(source)) is not None:
        given = [*settings, *([] if tokenizer is None else ["--tokenizer"])]
        return import_own(own, out=out, given=given, console=console)
    read = read_source(source)
    try:
        found = recognise(read.state, read.metadata)
    except ForeignError as error:
        raise ForeignError(f"{source}: {error}") from None
    found = replace(found, notes=(*found.notes, *describe_arguments(read)))
    if read.metadata.exported is not None:
        found = with_export_metadata(found, read.metadata.exported)
    console.print(f"{source}: {found.name}")
    found = require_heads(choose_method(found, settings, None if tokenizer is None else Path(tokenizer)), settings)
    if tokenizer is not None and found.method["name"] == "beit":
        found = with_tokenizer(found, Path(tokenizer))
    config, images = configure(found, settings, source.resolve().name)
    given = parse(settings)
    by_hand = bool({"data.mean", "data.std"} & set(given))
    weights, changes = fitted(found, config, images, by_hand=by_hand)
    with torch.device("meta"):
        method = config.build(images)
    wanted = method.state_dict()
    weights |= {name: value for name, value in described(images).items() if name in wanted}
    require_whole(wanted, weights, f"{source}: {found.kind}")
    copy_weights.require_fit(method, weights, str(source))

    files = [vars(file) for file in read.files]
    about = {
        "source": str(source.absolute()),
        "files": files,
        "kind": found.name,
        "licence": found.licence,
    }
    reasons = (f"weights of {source.resolve().name}: {found.name}", *found.notes, *changes)
    model = ImportedModel(config, images, method, weights)
    run = write_run(out, model, reasons, about)
    report_import(run, found, model, changes, by_hand=by_hand, console=console)
    return run


def import_own(own: OwnFile, *, out: str | Path, given: list[str], console: Console) -> Run:
    """Create a run from a file written by `unmask export --to safetensors`; the header of the file has all settings."""
    source, config = own.path, own.config
    if given:
        raise ConfigError(
            f"got {given[0]}, but {source} is an export of unmask with its own settings; leave it out; to "
            "change settings, use finetune or `pretrain --from`"
        )
    method, weights = own.read()  # already under unmask's names
    require_whole(method.state_dict(), weights, f"{source}: an export of unmask")
    name = f"an export of unmask: {config.method.name}, recipe {config.recipe}"
    files = [vars(fingerprint(source))]
    about = {"source": str(source.absolute()), "files": files, "kind": name, "licence": own.licence or UNSTATED}
    config = config.model_copy(update={"graft": ()})
    model = ImportedModel(config, own.images, method, weights)
    run = write_run(out, model, (f"weights of {source.name}: {name}",), about)
    console.print(f"{source}: {name}")
    console.print(f"{run.path}: {use_of(config.method.name)}")
    return run


def with_tokenizer(found: Recognised, path: Path) -> Recognised:
    """Add to a BEiT the dVAE whose codes it predicts. path: run of the dVAE.

    Raises ConfigError if the run is of another method or its dVAE has another number of codes.
    """
    run = Run.open(path)
    config: Any = read_config(run).method
    if config.name != "dvae":
        raise ConfigError(
            f"--tokenizer {path} is a run of {config.name}; expected the run of a dVAE: import DALL-E's, or train one"
        )
    if config.encoder.codes != (codes := len(found.weights["head.weight"])):
        raise ConfigError(
            f"--tokenizer {path} has {config.encoder.codes} codes, but this head predicts {codes}; give "
            "the dVAE used in its training, or leave it out"
        )
    _, network = checkpoint.load_model(run)
    weights = found.weights | {f"target.tokenizer.{name}": value for name, value in network.items()}
    return replace(found, method={**found.method, "tokenizer": config.encoder.model_dump()}, weights=weights)
