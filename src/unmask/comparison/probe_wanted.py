"""The options of the probe that all compared runs should have; torch is not imported."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from unmask.errors import UserError
from unmask.evals.probe_kind import LabelFreeMeasure, find_kind, kind_descriptions
from unmask.option import Option, Options
from unmask.shared_options import Device, TestData


@dataclass(frozen=True)
class ProbeWanted(Options):
    """The probe that every compared run should have, of its newest checkpoint, without controls and with seed 0.

    data: labelled images, or None to compare only existing measurements.
    """

    _: KW_ONLY
    data: Annotated[
        str | None, Option("Labelled images, on which runs without a result of this probe are probed.", metavar="DATA")
    ] = None
    test: TestData = None
    kind: Annotated[str, Option("Kind of probe.", metavar="KIND", choices=kind_descriptions)] = "linear"
    shots: Annotated[
        int | None, Option("Number of training labels per class.", metavar="N", at_least=1, default="all")
    ] = None
    device: Device = "auto"

    @property
    def is_label_free(self) -> bool:
        """Whether this kind of probe uses no labels, such as rankme. Raises UserError for an unknown kind."""
        return isinstance(find_kind(self.kind), LabelFreeMeasure)

    def check(self) -> None:
        """Raise UserError for probe options that would be ignored."""
        labels = self.test is not None or self.shots is not None
        if self.data is None and labels:
            raise UserError("got --test or --shots without --data, so there is nothing to probe; add --data")
        if self.is_label_free and labels:
            raise UserError(f"got --test or --shots, but --kind {self.kind} uses no labels; leave them out")
