"""`unmask export`: write the weights of a run for another library."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Option, Panel, Request, command
from unmask.commands.options import RunFolder, Step
from unmask.console import Console


@dataclass(frozen=True)
class ExportRequest(Request):
    """A run's weights for timm, transformers (hf), the official MAE code or ONNX, tested there, with a model card."""

    run: RunFolder
    _: KW_ONLY
    to: Annotated[
        str,
        Option(
            "timm; hf (encoder for transformers), hf-pretraining (with decoder or head); official (MAE's code); onnx "
            "(input as in the files), onnx-float; safetensors (the whole method, for unmask).",
            metavar="TARGET",
        ),
    ]
    out: Annotated[
        str | Path,
        Option("A new .safetensors, .pth or .onnx file, or for hf and hf-pretraining a new folder.", metavar="PATH"),
    ]
    step: Step = None


@command(ExportRequest, panel=Panel.EXCHANGE)
def export(request: ExportRequest, console: Console) -> dict[str, Any]:
    """Return what was written, and how it was tested."""
    from unmask.interop.export import export_run

    return export_run(request.run, request.to, request.out, step=request.step, console=console)
