"""`unmask export RUN --to TARGET --out PATH`: convert a run's weights for another library, with a model card.

The targets are the files of `interop/targets/`. If the other library is installed, every export is checked: the other
library loads the exported file, and its outputs for random images are compared with those of the run. An export with
different outputs is removed. Parts that a target cannot represent (such as a decoder for rectangles) are left out and
reported; if the target cannot represent the encoder either, the export is rejected.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from unmask.console import Console
from unmask.engine.load import load
from unmask.errors import name_in_errors
from unmask.interop.check_export import check_export
from unmask.interop.export_target import ExportedModel, ExportError
from unmask.interop.find_target import find_target, target_names
from unmask.interop.model_card import model_card
from unmask.results import ExportResult
from unmask.run import Run


def export_run(
    run: str | Path, to: str, out: str | Path, *, step: int | None = None, console: Console | None = None
) -> ExportResult:
    """Write the weights of a run for another library, with a model card, and return a summary of the export.

    step: step of the checkpoint, by default the newest. Raises UserError for an unknown target, a target that cannot
    represent this run, or an `out` that exists, and ExportFailed when the other library computes different outputs.
    """
    console = console or Console()
    target, out = find_target(to), Path(out)
    card = card_path(out, target.suffix)
    require_free(out, card, target.suffix)
    loaded = load(run, step=step)
    exported = target.convert(loaded)
    console.print(f"{run} at step {loaded.step}: {exported.what}")
    for note in exported.notes:
        console.print(f"  {note}")
    with name_in_errors(out):
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        staged = staging / out.name
        with name_in_errors(out):
            exported.write(staged)
        difference, tested = check_export(exported, staged, loaded, run)
        card_text = model_card(
            Run.open(run), loaded, target=target, exported=with_path(exported, out.name), tested=tested
        )
        card_path(staged, target.suffix).write_text(card_text, "utf-8")
        for file in sorted(staging.iterdir()):
            file.rename(out.parent / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    load_it = with_path(exported, str(out)).load
    console.print(f"  {tested}")
    console.print(f"  load it with:\n\n{indented(load_it)}\n")
    console.print(f"exported: {out}, with model card {card}")
    return ExportResult(
        run=str(run), to=to, out=str(out), card=str(card), what=exported.what, step=loaded.step, load=load_it,
        notes=exported.notes, difference=difference, tested=tested,
    )  # fmt: skip


def card_path(out: Path, suffix: str) -> Path:
    """Return the path of an export's model card, which is in the exported folder or beside the exported file."""
    return out.with_name(out.name + ".md") if suffix else out / "README.md"


def with_path(exported: ExportedModel, path: str) -> ExportedModel:
    """Replace PATH in the code that loads the export."""
    load_it, returns = (text.replace("PATH", json.dumps(path)) for text in (exported.load, exported.returns))
    return replace(exported, load=load_it, returns=returns)


def require_free(out: Path, card: Path, suffix: str) -> None:
    """Raise ExportError if the output path exists, has the wrong extension, or is not in an existing folder."""
    if suffix and out.suffix != suffix:
        raise ExportError(f"got output file {out}; expected a name that ends in {suffix}")
    if not suffix and out.suffix and out.suffix in {find_target(name).suffix for name in target_names()}:
        raise ExportError(f"got output {out}; expected a folder name without this extension")
    for taken in (out, card, out.with_name(out.name + ".data")):
        if taken.exists() or taken.is_symlink():
            raise ExportError(f"{taken} already exists and is not overwritten; choose another --out, or remove it")
    if not out.resolve().parent.is_dir():
        raise ExportError(f"the folder {out.resolve().parent} does not exist; create it, or choose another --out")


def indented(text: str) -> str:
    """Indent code for the console."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
