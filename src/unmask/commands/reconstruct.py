"""`unmask reconstruct`: draw images beside their reconstructions."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import Images, RunFolder, texts
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Device, Step

if TYPE_CHECKING:
    from unmask.results import ReconstructResult


@dataclass(frozen=True)
class ReconstructRequest(Request):
    """Draw images beside a run's reconstructions: original, masked, predicted, and original with predicted patches."""

    run: RunFolder
    images: Images
    _: KW_ONLY
    out: Annotated[str | Path, Option("Picture to write.", metavar="PNG")] = "reconstruction.png"
    step: Step = None
    seed: Annotated[int, Option("Random seed of the patch masks.", metavar="N")] = 0
    device: Device = "auto"


@command(ReconstructRequest, panel=Panel.MEASURE, to_json=lambda result: result.to_json())
def reconstruct(request: ReconstructRequest, console: Console) -> "ReconstructResult":
    """Return the path of the picture, the loss of the run, and the losses of baselines that need no training."""
    from unmask.evals.reconstruct_images import reconstruct_images

    return reconstruct_images(
        Path(request.run),
        texts(request.images),
        Path(request.out),
        step=request.step,
        seed=request.seed,
        device=request.device,
        console=console,
    )
