"""Options that several functions and verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from unmask.option import Option

Data = Annotated[
    str | Path,
    Option(
        "Images: a folder, list file, glob, tar, zip or parquet file, or a built-in set: shapes, digits.",
        metavar="DATA",
        command_line=str,
    ),
]
Exclude = Annotated[
    Sequence[str],
    Option(
        "Exclude images whose file name, folder name or path matches, e.g. thumbs or '*_mask.png'; repeatable.",
        metavar="PATTERN",
    ),
]
Settings = Annotated[
    Sequence[str],
    Option("Change a setting of the recipe, e.g. train.steps=1000; repeatable.", metavar="KEY=VALUE", flag="--set"),
]
TestData = Annotated[str | None, Option("Test images.", metavar="DATA", default="a fifth of DATA")]
Step = Annotated[int | None, Option("Step of the checkpoint to use.", metavar="N", default="the newest")]
Device = Annotated[str, Option("Device: auto, cpu, cuda, cuda:N or mps.")]
Recipe = Annotated[str, Option("Recipe from `unmask recipes`, or auto, which chooses one for the images.")]
