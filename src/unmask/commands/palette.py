"""`unmask palette`: choose the colours of an iGPT."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Data


@dataclass(frozen=True)
class PaletteRequest(Request):
    """Compute the colour palette of an iGPT from images, and write it to a file that several runs can share."""

    data: Data
    _: KW_ONLY
    colours: Annotated[int, Option("Number of colours.", metavar="N")] = 512
    size: Annotated[
        int, Option("Shrink images to this many pixels per side before choosing colours.", metavar="PIXELS")
    ] = 32
    out: Annotated[
        str | Path,
        Option(
            "File to write, FILE.json; a picture of the images in these colours is written beside it.", metavar="FILE"
        ),
    ] = "palette.json"


@command(PaletteRequest, panel=Panel.FILES)
def palette(request: PaletteRequest, console: Console) -> dict[str, Any]:
    """Return the contents of the palette file."""
    from unmask.engine.palette_file import make_palette

    return make_palette(
        str(request.data), colours=request.colours, size=request.size, out=Path(request.out), console=console
    )
