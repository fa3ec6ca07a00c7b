"""`unmask embed`: write the features of every image to a table."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder, SeveralData, texts
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Device, Exclude, Step

if TYPE_CHECKING:
    from unmask.results import EmbedResult


@dataclass(frozen=True)
class EmbedRequest(Request):
    """Write the features of every image to a table; no patches are hidden.

    The columns of the table are name, label (of labelled images), cls (the class token) and mean (the mean of the patch
    tokens).
    """

    run: RunFolder
    data: SeveralData
    _: KW_ONLY
    out: Annotated[str | Path, Option("Table to write: FILE.parquet or FILE.npz.", metavar="FILE")]
    exclude: Exclude = ()
    step: Step = None
    device: Device = "auto"


@command(EmbedRequest, panel=Panel.MEASURE, together=True, to_json=lambda result: result.to_json())
def embed(request: EmbedRequest, console: Console) -> "EmbedResult":
    """Return the path of the file, the number of images, and the columns."""
    from unmask.evals.embed_images import embed_images

    return embed_images(
        Path(request.run),
        texts(request.data),
        Path(request.out),
        exclude=request.exclude,
        step=request.step,
        device=request.device,
        console=console,
    )
