"""`ablation.json`: what was asked for, and the cells of a table with the settings and steps of each, decided once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from unmask.comparison.paper_tables import SHARED, Paper
from unmask.comparison.run_facts import ImageFlops
from unmask.config import ConfigError
from unmask.data.sources.source import Source
from unmask.engine.training_data import DataError
from unmask.run import Run

PLAN_FILE = "ablation.json"


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What a person asks for. A table is one experiment: nothing but `seeds` may change once it has begun.

    table: a name of `paper_tables.TABLES`. data, test: labelled images; labels are used by probes and fine-tuning only.
    recipe: the base of every cell, mae_nano when None (`family` has its own). settings: KEY=VALUE for every cell.
    budget: seconds for the whole table, None for the recipe's own length. shots: labels per class for the probes, None
    for as many as keep a probe short (for fine-tuning: all). tokenizer: a dVAE's run for the cells that need one, None
    trains one first. from_run: the pre-trained run that fig9 fine-tunes, None trains one first.
    """

    table: str
    data: str
    test: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    budget: float | None = None
    seeds: int = 1
    shots: int | None = None
    tokenizer: str | None = None
    from_run: str | None = None

    @property
    def base_recipe(self) -> str:
        """The base of every cell, once it has been chosen."""
        assert self.recipe is not None, "choose_recipe replaces None"
        return self.recipe


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """What a cell costs: FLOPs as counted and, where there is a time budget, seconds as measured."""

    batch_size: int
    parameters: int
    encoder_parameters: int
    flops: ImageFlops
    precision: str
    step_seconds: float | None = None
    reading_seconds: float | None = None
    probe_seconds: float | None = None

    @property
    def training_flops(self) -> int:
        """FLOPs of one image, forward and backward."""
        assert self.flops.training is not None, "every cell trains a task"
        return self.flops.training


@dataclass(frozen=True, kw_only=True)
class PlannedCell(CellCost):
    """A cell with the settings it is trained with, for `steps` steps; the other fields are those of `Cell`.

    settings: all but length and seed; varied: those that this cell sets over the table's. controls: its probes include
    the controls. fine_tunes: it is fine-tuned from another run.
    """

    name: str
    label: str
    theirs: str
    at: float | None
    recipe: str
    settings: tuple[str, ...]
    varied: tuple[str, ...]
    steps: int
    equal: str
    base: bool
    controls: bool
    tokenizer: bool
    fine_tunes: bool
    paper: Paper

    @property
    def shared(self) -> bool:
        """Whether other cells are made from this run, which is not a row of the comparison."""
        return self.name in SHARED

    def run_name(self, seed: int) -> str:
        """Return the name of the folder of this cell's run with a seed."""
        return self.name if self.shared else f"{self.name}-seed-{seed}"


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """What was decided when a table was begun.

    missing: labels of cells that this version cannot train. steps: of a cell of length 1; reason: why so many. shots:
    labels per class of the probes. pool: which pooling is compared. fingerprint: of the images. versions, git, command,
    time: of the process that decided.
    """

    asked: TableRequest
    title: str
    axis: str
    note: str
    log: bool
    base: tuple[str, ...]
    missing: tuple[str, ...]
    measure: str
    steps: int
    reason: str
    shots: int
    pool: str
    device: str
    fingerprint: str
    cells: tuple[PlannedCell, ...]
    versions: dict[str, Any] = field(default_factory=dict)
    git: dict[str, Any] | None = None
    command: str = ""
    time: str = ""

    @property
    def base_cell(self) -> PlannedCell:
        """The cell that the others are compared with."""
        return next(cell for cell in self.cells if cell.base)

    def runs_of(self, cell: PlannedCell) -> range:
        """Return the seeds that a cell is trained with; a shared cell is trained once."""
        return range(1 if cell.shared else self.asked.seeds)


_PLAN = TypeAdapter(TablePlan)


def write_plan(folder: Path, plan: TablePlan) -> None:
    """Write the plan of a table into its folder."""
    Run(folder).write(PLAN_FILE, _PLAN.dump_python(plan, mode="json"))


def has_plan(folder: Path) -> bool:
    """Whether a table was begun in this folder."""
    return (folder / PLAN_FILE).exists()


def load_plan(folder: Path) -> TablePlan:
    """Read the plan of a table from its folder."""
    return _PLAN.validate_python(Run(folder).read(PLAN_FILE))


def continue_plan(folder: Path, asked: TableRequest, source: Source) -> TablePlan:
    """Read the plan of a table that was begun, with as many seeds as are asked for now; cells keep their steps.

    Raises ConfigError when something else is asked for, and DataError when the images have changed.
    """
    plan = load_plan(folder)
    for key, value in vars(asked).items():
        before = getattr(plan.asked, key)
        if key != "seeds" and before != value:
            raise ConfigError(
                f"{folder} was begun with {key} {before!r}, got {value!r}; a table is one experiment: repeat the "
                "first command, or choose another --out"
            )
    if asked.seeds < plan.asked.seeds:
        raise ConfigError(
            f"{folder} was begun with {plan.asked.seeds} seeds, got {asked.seeds}; give as many or more, or choose "
            "another --out"
        )
    if source.fingerprint() != plan.fingerprint:
        raise DataError(
            f"the images of {asked.data} have changed since this table was begun, so its cells could not be compared; "
            "restore the old files, or choose another --out"
        )
    if asked.seeds > plan.asked.seeds:
        plan = replace(plan, asked=asked)
        write_plan(folder, plan)
    return plan
