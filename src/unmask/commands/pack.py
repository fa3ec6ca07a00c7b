"""`unmask pack`: copy images into one tar."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Exclude

if TYPE_CHECKING:
    from unmask.data.pack_images import PackSummary


@dataclass(frozen=True)
class PackRequest(Request):
    """Copy images into one tar file and shrink large ones, for faster training with the same crops and patch masks."""

    data: Annotated[str, Option("Image files: a folder, glob, tar, zip or parquet file.", metavar="DATA")]
    out: Annotated[str | Path, Option("New .tar file, which every command accepts as DATA.", metavar="OUT")]
    _: KW_ONLY
    exclude: Exclude = ()
    short_side: Annotated[
        int, Option("Shrink larger images until their shorter side has this length.", metavar="PIXELS", at_least=1)
    ] = 512
    quality: Annotated[int, Option("JPEG quality, 1 to 100.", metavar="N", at_least=1, at_most=100)] = 90
    workers: Annotated[
        int | None,
        Option(
            "Number of worker processes; 0 packs in the main process.", metavar="N", default="one per core", at_least=0
        ),
    ] = None


@command(PackRequest, panel=Panel.FILES, to_json=lambda packed: packed.as_json())
def pack(request: PackRequest, console: Console) -> "PackSummary":
    """Return the numbers of images that were copied, shrunk and left out."""
    from unmask.data.pack_images import pack

    return pack(
        request.data,
        Path(request.out),
        short_side=request.short_side,
        quality=request.quality,
        workers=request.workers,
        exclude=request.exclude,
        console=console,
    )
