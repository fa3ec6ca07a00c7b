"""`unmask reconstruct`: draw images beside their reconstructions."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Option, Panel, Request, command
from unmask.commands.options import Device, Images, RunFolder, Step, texts
from unmask.console import Console


@dataclass(frozen=True)
class ReconstructRequest(Request):
    """Draw images and their reconstructions by a run: original, masked, predicted, and both combined."""

    run: RunFolder
    images: Images
    _: KW_ONLY
    out: Annotated[str | Path, Option("Picture to write.", metavar="PNG")] = "reconstruction.png"
    step: Step = None
    seed: Annotated[int, Option("Random seed of the patch masks.", metavar="N")] = 0
    device: Device = "auto"


@command(ReconstructRequest, panel=Panel.MEASURE)
def reconstruct(request: ReconstructRequest, console: Console) -> dict[str, Any]:
    """Return the path of the picture, the loss, and the losses of baselines that need no training."""
    from unmask.evals.reconstruct import reconstruct_images

    out = Path(request.out)
    numbers = reconstruct_images(
        Path(request.run),
        texts(request.images),
        out,
        step=request.step,
        seed=request.seed,
        device=request.device,
        console=console,
    )
    return {"picture": str(out), **numbers}
