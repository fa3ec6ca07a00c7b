"""`unmask import`: make a run from weights of another library."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Settings

if TYPE_CHECKING:
    from unmask.run import Run


@dataclass(frozen=True)
class ImportRequest(Request):
    """Make a run from weights of another library; --set data.size and data.channels adapt them to other images."""

    weights: Annotated[
        str | Path,
        Option(
            "Weights of official MAE or BEiT, timm, transformers or DALL-E's dVAE: a file, or a folder with its "
            "config.json.",
            metavar="FILE",
        ),
    ]
    _: KW_ONLY
    out: Annotated[str | Path, Option("New run folder.", metavar="RUN")]
    tokenizer: Annotated[
        str | Path | None, Option("Run of the imported dVAE, for a pre-trained BEiT.", metavar="RUN")
    ] = None
    settings: Settings = ()


def import_json(run: "Run") -> dict[str, Any]:
    """Return the run's folder and what was imported."""
    return {"run": str(run.path), **run.read("provenance.json")["imported"]}


@command(ImportRequest, panel=Panel.EXCHANGE, to_json=import_json)
def import_weights(request: ImportRequest, console: Console) -> "Run":
    """Return the new run."""
    from unmask.interop.import_weights import import_weights

    return import_weights(
        request.weights, request.out, settings=request.settings, tokenizer=request.tokenizer, console=console
    )
