"""The options of a probe, and checks of their combinations. Does not import torch."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from unmask.errors import UserError
from unmask.option import Option, Options
from unmask.shared_options import Data, Device, Exclude, Step, TestData

DEFAULT_DRAWS, MAX_DRAWS = 5, 1000
"""Random draws of training labels per point of a label-budget curve."""


def parse_shots(text: str | None) -> int | tuple[int, ...] | None:
    """Parse --shots: "5" for 5 labels per class, "1,5,10" for a label-budget curve. Raises UserError otherwise."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"got --shots {text}; expected a number of labels per class, or several as 1,5,10")
    numbers = tuple(int(part) for part in parts)
    return numbers[0] if len(numbers) == 1 else numbers


def target_types() -> dict[str, str]:
    """Return the values of --target-type with their descriptions."""
    return {"classes": "one class per image", "multilabel": "columns of 0 and 1", "regression": "numbers"}


def names_from_text(text: str) -> list[str]:
    """Parse a comma-separated list of names, such as 'a, b'."""
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class ProbeOptions(Options):
    """The options of `unmask probe`, apart from the run and the kind of probe.

    `exclude` applies to both training and test images. Without `test`, a fifth of every class is held out as test
    images. `seed` also determines which training images are held out to choose hyperparameters. By default,
    `mask_votes` is 1 for encoders that are evaluated with hidden tokens (iGPT's bert objective), otherwise 0. `layer`
    also applies to other runs whose encoders have layers to choose from; `mask_votes` applies only to this run.
    """

    data: Data
    _: KW_ONLY
    exclude: Exclude = ()
    test: TestData = None
    shots: Annotated[
        int | Sequence[int] | None,
        Option(
            "Number of training labels per class; several numbers, such as 1,5,10, measure a label-budget curve.",
            metavar="N[,N...]",
            default="all",
            command_line=str,
            from_text=parse_shots,
        ),
    ] = None
    label_draws: Annotated[
        int | None,
        Option("Number of random choices of labels for each point of a label-budget curve.", metavar="N", default="5"),
    ] = None
    controls: Annotated[bool, Option("Also probe two baselines: raw pixels and the untrained encoder.")] = False
    against: Annotated[
        str | Path | Sequence[str | Path], Option("Also probe the encoder of this run; repeatable.", metavar="RUN")
    ] = ()
    targets: Annotated[
        str | Path | None,
        Option(
            "Table of targets (.csv or .parquet) instead of class folders; paths in its column path are relative to "
            "DATA.",
            metavar="FILE",
        ),
    ] = None
    columns: Annotated[
        Sequence[str] | None,
        Option(
            "Target columns of the table.",
            metavar="A,B,...",
            default="all",
            command_line=str,
            from_text=names_from_text,
        ),
    ] = None
    target_type: Annotated[
        str | None, Option("Type of the targets.", metavar="TYPE", default="inferred", choices=target_types)
    ] = None
    test_targets: Annotated[
        str | Path | None, Option("Table of targets for the --test images.", metavar="FILE", default="the same table")
    ] = None
    seed: Annotated[int, Option("Random seed for the held-out fifth and for the choice of labels.", metavar="N")] = 0
    step: Step = None
    layer: Annotated[
        str | None,
        Option(
            "Layer to take features from: best, last or a number; 0 is the input of the first block, 1 that of the "
            "second, and so on.",
            metavar="LAYER",
            default="best for igpt, else last",
        ),
    ] = None
    mask_votes: Annotated[
        int | None,
        Option(
            "igpt bert: classify each test image under this many random patch masks, and use the majority; 0 uses no "
            "mask.",
            metavar="N",
            default="1",
            at_least=0,
        ),
    ] = None
    device: Device = "auto"

    @property
    def other_runs(self) -> tuple[Path, ...]:
        """The folders of the runs in `against`."""
        given = (self.against,) if isinstance(self.against, str | Path) else self.against
        return tuple(Path(run) for run in given)

    @property
    def budgets(self) -> Sequence[int | None]:
        """The numbers of labels per class, in ascending order, or [None] if all labels are used."""
        if self.shots is None or isinstance(self.shots, int):
            return [self.shots]
        return sorted(set(self.shots))

    @property
    def is_curve(self) -> bool:
        """Whether the result is a label-budget curve."""
        return self.label_draws is not None or len(self.budgets) > 1

    @property
    def num_draws(self) -> int:
        """The number of random draws of labels for every number of labels per class."""
        if not self.is_curve:
            return 1
        return DEFAULT_DRAWS if self.label_draws is None else self.label_draws

    def check(self) -> None:
        """Raise UserError for option values that are impossible or would be ignored; called before any data is read."""
        if self.label_draws is not None and self.shots is None:
            raise UserError(
                f"got --label-draws {self.label_draws} without --shots, so there is nothing to draw; give the labels "
                "per class too, for example --shots 1,5,10"
            )
        if self.label_draws is not None and self.label_draws < 2:
            raise UserError(
                f"got --label-draws {self.label_draws}; expected at least 2, and {DEFAULT_DRAWS} or more for a narrow "
                "interval"
            )
        if self.num_draws > MAX_DRAWS:
            raise UserError(
                f"got --label-draws {self.label_draws}; expected at most {MAX_DRAWS}, and usually {DEFAULT_DRAWS} to 20"
            )
        if not self.budgets:
            raise UserError("got no number of labels per class; expected at least one, for example --shots 1,5,10")
        table_only = {"--test-targets": self.test_targets, "--columns": self.columns, "--target-type": self.target_type}
        if self.targets is None and (given := [name for name, value in table_only.items() if value is not None]):
            raise UserError(f"got {', '.join(given)} without --targets, so it would be ignored; give the table too")
        if self.test_targets is not None and self.test is None:
            raise UserError("got --test-targets without --test, so it would be ignored; give the test images too")

    def check_label_free(self, kind: str) -> None:
        """Raise UserError for options that a kind of probe without labels would ignore."""
        labels = {
            "--test": self.test,
            "--shots": self.shots,
            "--label-draws": self.label_draws,
            "--targets": self.targets,
        }
        if given := [name for name, value in labels.items() if value is not None]:
            raise UserError(f"got {', '.join(given)}, but --kind {kind} uses no labels; leave it out")
        if self.seed:
            raise UserError(f"got --seed {self.seed}, but --kind {kind} draws nothing at random; leave it out")
        if self.controls:
            raise UserError(f"got --controls, but --kind {kind} always measures the controls; leave it out")
        if self.mask_votes is not None and self.mask_votes > 1:
            raise UserError(
                f"got --mask-votes {self.mask_votes}, but --kind {kind} has no votes; use 0 for whole images or 1 mask"
            )
        if self.layer == "best":
            raise UserError(f"got --layer best, which needs labels, but --kind {kind} uses none; give a number or last")
