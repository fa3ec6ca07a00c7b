"""`unmask predict`: apply a fine-tuned run to images."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import Images, RunFolder, texts
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Device, Step

if TYPE_CHECKING:
    from unmask.results import PredictResult


@dataclass(frozen=True)
class PredictRequest(Request):
    """Predict classes with probabilities, segmentation masks or boxes with a fine-tuned run. Overwrites --out."""

    run: RunFolder
    images: Images
    _: KW_ONLY
    out: Annotated[
        str | Path,
        Option(
            "File to write: .csv, .json or .parquet for classes, .json for boxes; a folder for segmentation masks.",
            metavar="PATH",
        ),
    ]
    min_score: Annotated[
        float,
        Option("Drop boxes with a score below this, 0.05 to 1.", metavar="SCORE", at_least=0.05, at_most=1),
    ] = 0.05
    step: Step = None
    device: Device = "auto"


@command(
    PredictRequest,
    panel=Panel.MEASURE,
    together=True,
    to_json=lambda result: result.to_json(),
    renamed={"--least": "--min-score"},
)
def predict(request: PredictRequest, console: Console) -> "PredictResult":
    """Return the path of the output and the number of images."""
    from unmask.finetuning.predict_images import PredictOptions
    from unmask.finetuning.predict_images import predict as run_predict

    options = PredictOptions(request.step, request.device, request.min_score)
    return run_predict(Path(request.run), texts(request.images), Path(request.out), options, console)
