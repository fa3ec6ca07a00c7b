"""`unmask export`: write the weights of a run for another library."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Step

if TYPE_CHECKING:
    from unmask.results import ExportResult


def targets() -> dict[str, str]:
    """Return the export targets with their descriptions."""
    from unmask.interop.find_target import target_names, target_summary

    return {name: target_summary(name).removesuffix(".") for name in target_names()}


@dataclass(frozen=True)
class ExportRequest(Request):
    """Export weights to timm, transformers, the official MAE code or ONNX; write a model card and test the result."""

    run: RunFolder
    _: KW_ONLY
    to: Annotated[
        str,
        Option("Target format.", metavar="TARGET", choices=targets),
    ]
    out: Annotated[
        str | Path,
        Option("New file with the extension of the target, or new folder; see --to.", metavar="PATH"),
    ]
    step: Step = None


@command(ExportRequest, panel=Panel.EXCHANGE, to_json=lambda result: result.to_json())
def export(request: ExportRequest, console: Console) -> "ExportResult":
    """Return the path of the export and the result of its test."""
    from unmask.interop.export_run import export_run

    return export_run(request.run, request.to, request.out, step=request.step, console=console)
