"""The options of pre-training. This module does not import torch."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from unmask.option import Option, Options
from unmask.shared_options import Exclude, Recipe, Settings


@dataclass(frozen=True)
class PretrainOptions(Options):
    """The settings of a pre-training run and its initial weights.

    config replaces the settings of a recipe. from_run: see `initial_weights.continued`.
    """

    _: KW_ONLY
    exclude: Exclude = ()
    recipe: Recipe = "auto"
    config: Annotated[
        str | Path | None,
        Option("Use the settings of another run (its folder or config.json) instead of a recipe.", metavar="FILE"),
    ] = None
    from_run: Annotated[
        str | Path | None,
        Option(
            "Start from the weights of this run, with its settings; with --recipe, from its encoder alone.",
            metavar="RUN",
            flag="--from",
        ),
    ] = None
    tokenizer: Annotated[
        str | Path | None,
        Option("beit, and mae with target=tokens: run of the dVAE whose codes the method predicts.", metavar="RUN"),
    ] = None
    palette: Annotated[
        str | Path | None,
        Option("igpt: use the palette of a file from `unmask palette`, or of a run.", metavar="PATH"),
    ] = None
    masks: Annotated[
        str | Path | None,
        Option("mae: patch mask file; hidden patches are # in .txt, true in .npy, black in .png.", metavar="FILE"),
    ] = None
    settings: Settings = ()
