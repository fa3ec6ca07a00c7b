"""The options of a probe, and checks of their combinations. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import UserError

DEFAULT_DRAWS, MAX_DRAWS = 5, 1000
"""Random draws of training labels per point of a label-budget curve."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """The options of `unmask probe`.

    data: the labelled images (any source). test: other labelled images for testing, by default a held-out fifth of
    every class of `data`. exclude: patterns of file names to leave out of both. shots: labels per class for training;
    several numbers make a label-budget curve with `draws` random draws for each. controls: also measure raw pixels and
    the untrained encoder. against: other runs to measure on the same images. seed: seed of the split, of the draws of
    labels, and of the training images that are held out to choose hyperparameters.

    targets: a table of labels or quantities, used instead of class folders. columns: the columns to use, all by
    default. task: overrides the detected kind of target. test_targets: another table for `test`.

    layer: "best", "last" or a number; the default depends on the encoder. mask_votes: number of random patch masks per
    test image, whose predictions are combined by vote; by default 1 for encoders that are evaluated with hidden tokens
    (iGPT's bert objective), else 0. Other runs use the same layer, if their encoders have layers to choose from, and
    their own default masks.
    """

    data: str
    test: str | None = None
    exclude: tuple[str, ...] = ()
    shots: int | tuple[int, ...] | None = None
    draws: int | None = None
    controls: bool = False
    against: tuple[Path, ...] = ()
    targets: Path | None = None
    test_targets: Path | None = None
    columns: tuple[str, ...] | None = None
    task: str | None = None
    seed: int = 0
    step: int | None = None
    layer: str | None = None
    mask_votes: int | None = None
    device: str = "auto"

    @property
    def budgets(self) -> Sequence[int | None]:
        """The numbers of labels per class, ascending; [None] for all labels."""
        if self.shots is None or isinstance(self.shots, int):
            return [self.shots]
        return sorted(set(self.shots))

    @property
    def is_curve(self) -> bool:
        """Whether the result is a label-budget curve."""
        return self.draws is not None or len(self.budgets) > 1

    @property
    def num_draws(self) -> int:
        """Random draws of labels per number of labels per class."""
        if not self.is_curve:
            return 1
        return DEFAULT_DRAWS if self.draws is None else self.draws

    def check(self) -> None:
        """Raise UserError for options that would be ignored or are impossible, before anything is read."""
        if self.draws is not None and self.shots is None:
            raise UserError(
                f"got --label-draws {self.draws} without --shots, so there is nothing to draw; give the labels per "
                "class too, for example --shots 1,5,10"
            )
        if self.draws is not None and self.draws < 2:
            raise UserError(
                f"got --label-draws {self.draws}; expected at least 2, and {DEFAULT_DRAWS} or more for a narrow "
                "interval"
            )
        if self.num_draws > MAX_DRAWS:
            raise UserError(
                f"got --label-draws {self.draws}; expected at most {MAX_DRAWS}, and usually {DEFAULT_DRAWS} to 20"
            )
        if not self.budgets:
            raise UserError("got no number of labels per class; expected at least one, for example --shots 1,5,10")
        table_only = {"--test-targets": self.test_targets, "--columns": self.columns, "--target-type": self.task}
        if self.targets is None and (given := [name for name, value in table_only.items() if value is not None]):
            raise UserError(f"got {', '.join(given)} without --targets, so it would be ignored; give the table too")
        if self.test_targets is not None and self.test is None:
            raise UserError("got --test-targets without --test, so it would be ignored; give the test images too")

    def check_label_free(self, kind: str) -> None:
        """Raise UserError for options that would be ignored by a kind without labels."""
        labels = {"--test": self.test, "--shots": self.shots, "--label-draws": self.draws, "--targets": self.targets}
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


def parse_shots(text: str | None) -> int | tuple[int, ...] | None:
    """Parse --shots: "5" for one number of labels per class, "1,5,10" for a curve. Raises UserError otherwise."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"got --shots {text}; expected a number of labels per class, or several as 1,5,10")
    numbers = tuple(int(part) for part in parts)
    return numbers[0] if len(numbers) == 1 else numbers
