"""`unmask export RUN --to TARGET --out PATH`: a Run's weights for other libraries, with a model card beside them.

    timm            one .safetensors file for timm's VisionTransformer, or its Beit
    hf              a folder for transformers: its ViT, BEiT or ImageGPT, and its preprocessing; `AutoModel` gives all
                    tokens, equal to the features here
    hf-pretraining  the same with the decoder or the head of the pre-training: ViTMAEForPreTraining (which hides patches
                    at random whenever it runs), BeitForMaskedImageModeling
    official        {"model": state dict} in a .pth file, under the names of official MAE
    onnx            the encoder with its normalisation, for any runtime; its input has the dtype of the files
    onnx-float      the same with float32 input, in the units of the files
    safetensors     the whole method under our own names, its settings in the header; `safetensors_file.py` reads it

An export ends with a test: the other library, where it is installed, loads what was written, and its features of random
images are held against those of the Run. What computes something else is removed. What a target cannot express (a
decoder for rectangles, a head on other tokens) is left out and said; where not even the encoder fits, it is refused.

What a target makes of a Run is in `interop/targets/timm.py` (official besides), `interop/targets/hf.py` and
`interop/targets/onnx.py`; here it is staged, tested and put in its place. Names and tensors are turned by
`interop/export_names.py`; the card is `interop/model_card.py`'s.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.batch import DTYPES, ImageSpec
from unmask.config import nearest
from unmask.console import Console
from unmask.engine.load import Loaded, load
from unmask.errors import naming
from unmask.interop.model_card import last_name, model_card
from unmask.interop.safetensors_file import HEADER, open_safetensors
from unmask.interop.targets.common import (
    ExportError,
    ExportFailed,
    Made,
    NotChecked,
    largest,
    quietly,
    weights_of,
    write_safetensors,
)
from unmask.interop.targets.hf import to_hf, to_hf_pretraining
from unmask.interop.targets.onnx import to_onnx, to_onnx_float
from unmask.interop.targets.timm import to_official, to_timm
from unmask.run import Run
from unmask.tasks.classify import Classifier

TOLERANCE = 1e-4
CHECKED = 3  # random images


def export_run(
    run: str | Path, to: str, out: str | Path, *, step: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Write the weights of a Run for another library, and its model card; returns what was written and tested.

    step: of the checkpoint, None for the newest. Raises ValueError for a target that is not known, one that has no form
    for this Run, or an `out` that is taken; ExportFailed when the other library does not compute the same.
    """
    console = console or Console()
    if to not in TARGETS:
        raise ExportError(f"target {to!r} is not known; {nearest(to, TARGETS)}")
    out, suffix, make = Path(out), *TARGETS[to]
    card = out / "README.md" if not suffix else out.with_name(out.name + ".md")
    require_free(out, card, suffix)
    loaded = load(run, step=step)
    made = make(loaded)
    console.say(f"{run} at step {loaded.step}: {made.what}")
    for note in made.notes:
        console.say(f"  {note}")
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        inside = staging / out.name
        with naming(out):
            made.write(inside)
        difference, tested = test(made, inside, loaded, run)
        name = inside / "README.md" if not suffix else inside.with_name(inside.name + ".md")
        load_it, returns = (text.replace("PATH", json.dumps(out.name)) for text in (made.load, made.returns))
        text = model_card(
            Run.open(run), config=loaded.config, plan=loaded.plan, step=loaded.step, to=to, what=made.what,
            load=load_it, returns=returns, notes=made.notes, tested=tested, classifies=made.classifies,
            whole=made.classifies or to == "safetensors",
        )  # fmt: skip
        name.write_text(text, "utf-8")
        for file in sorted(staging.iterdir()):
            file.rename(out.parent / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    console.say(f"  {tested}")
    console.say(f"  load it with:\n\n{indented(made.load.replace('PATH', json.dumps(str(out))))}\n")
    console.say(f"{out}, with its model card {card}")
    return {
        "run": str(run), "to": to, "out": str(out), "card": str(card), "what": made.what, "step": loaded.step,
        "load": made.load.replace("PATH", json.dumps(str(out))), "notes": list(made.notes), "difference": difference,
        "tested": tested,
    }  # fmt: skip


def require_free(out: Path, card: Path, suffix: str) -> None:
    """Raises ExportError for a name that is taken, of another ending, or in no folder."""
    if suffix and out.suffix != suffix:
        raise ExportError(f"output file {out} came; a name that ends in {suffix} was expected")
    if not suffix and out.suffix and out.suffix in {ending for ending, _ in TARGETS.values()}:
        raise ExportError(f"output {out} came; a folder was expected, without that ending")
    for taken in (out, card, out.with_name(out.name + ".data")):
        if taken.exists() or taken.is_symlink():
            raise ExportError(f"{taken} exists already and is not overwritten; choose another --out, or remove it")
    if not out.resolve().parent.is_dir():
        raise ExportError(f"the folder {out.resolve().parent} does not exist; make it first, or choose another --out")


def indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def test(made: Made, path: Path, loaded: Loaded, run: str | Path) -> tuple[float | None, str]:
    """(largest difference, what came of it in a sentence). Raises ExportFailed when it is more than TOLERANCE."""
    try:
        with torch.inference_mode(), quietly():
            difference = made.check(path, random_images(loaded.plan.images))
    except NotChecked as reason:
        return None, f"not checked: {reason}"
    if not difference <= TOLERANCE:
        raise ExportFailed(
            f"what was exported of {run}, loaded by {made.library}, differs by up to {difference:.3g} from the run on "
            f"{CHECKED} random images, where at most {TOLERANCE:g} was expected; it has been removed, so nothing wrong "
            "is left. This is a fault in unmask, or a version of that library it does not know; --to safetensors needs "
            "no other library"
        )
    return difference, (
        f"checked: {made.library} computes the same from it, up to {difference:.1e} on {CHECKED} random images"
    )


def random_images(images: ImageSpec) -> Tensor:
    """(CHECKED, C, H, W) in the files' dtype and units, always the same."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.tensor(values)[:, None, None] for values in images.value_range)
    unit = torch.rand(CHECKED, images.channels, *images.size, generator=generator)
    pixels = low + unit * (high - low)
    return (pixels if images.dtype == "float32" else pixels.round().clamp(0, 65535)).to(DTYPES[images.dtype])


def to_safetensors(loaded: Loaded) -> Made:
    """The whole method under our own names; settings and images in the header of the file."""
    spec = loaded.plan.images
    config = loaded.config.model_dump(mode="json")
    config |= {part: without_folders(config[part]) for part in ("data", "graft")}  # where they lay is nobody's business
    header = {"config": config, "images": vars(spec), "step": loaded.step, "licence": loaded.licence}

    def check(path: Path, images: Tensor) -> float:
        again = open_safetensors(path)
        ours, theirs = loaded.method.encoder(images), again.encoder(images)
        same = [(theirs.patches, ours.patches)]
        state, other = loaded.method.state_dict(), again.state_dict()
        return largest(*same, *((other[name].float(), value.float()) for name, value in state.items()))

    return Made(
        what=f"the whole method ({loaded.config.method.name}) under its own names",
        library="unmask",
        load="from unmask.one_file import open_safetensors\n\nmethod = open_safetensors(PATH)",
        returns="`method.encoder(images)` takes images in the files' own units and gives `.cls` and `.patches`.",
        write=lambda path: write_safetensors(path, weights_of(loaded.method), {HEADER: json.dumps(header)}),
        check=check,
        classifies=isinstance(loaded.method, Classifier),
    )


def without_folders(value: Any) -> Any:
    """Settings with only the last name of every path in them."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return last_name(value) if isinstance(value, str) else value


TARGETS: dict[str, tuple[str, Callable[[Loaded], Made]]] = {
    "timm": (".safetensors", to_timm),
    "hf": ("", to_hf),
    "hf-pretraining": ("", to_hf_pretraining),
    "official": (".pth", to_official),
    "onnx": (".onnx", to_onnx),
    "onnx-float": (".onnx", to_onnx_float),
    "safetensors": (".safetensors", to_safetensors),
}
"""By name: the ending of what is written, none for a folder, and what makes it."""
