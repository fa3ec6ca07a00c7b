"""Resolve and check the recipe and settings of every cell of a table before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.comparison.paper_tables import PRETRAINED, TOKENIZER, Cell, Table
from unmask.comparison.table_plan import TableRequest
from unmask.config import Config, ConfigError, parse
from unmask.data.sources.source import Source
from unmask.engine import resolve
from unmask.engine.load import read_config, read_plan
from unmask.engine.recipe_costs import stand_in_tokenizer
from unmask.finetuning import configure
from unmask.recipes import catalogue
from unmask.run import Run

LENGTHS = ("train.steps", "train.epochs")


def choose_recipe(table: Table, recipe: str | None, from_run: str | Path | None = None) -> str:
    """Return the name of the recipe that the cells of a table vary.

    recipe: value of --recipe, or None. from_run: value of --from, or None. Raises ConfigError for a recipe or run that
    cannot be used for this table.
    """
    if from_run is not None:
        if table.measure != "fine_tuned":
            raise ConfigError(
                f"--from was given, but every cell of table {table.name} is pre-trained from scratch; leave it out"
            )
        if recipe is not None:
            raise ConfigError(
                f"got both --from and --recipe {recipe}, but the run of --from has its own recipe; leave one out"
            )
        return read_config(Run.open(from_run)).recipe
    if table.name == "family":
        if recipe is not None:
            raise ConfigError(
                f"got recipe {recipe!r}, but every method of the family has its own recipe; leave --recipe out"
            )
        return "mae_nano"
    method = catalogue.find(recipe or "mae_nano").method.name
    if method != "mae":
        raise ConfigError(
            f"recipe {recipe!r} trains {method}, but table {table.name} varies settings of mae; choose one of "
            f"{', '.join(name for name in catalogue.all_recipes() if name.startswith('mae'))}"
        )
    return recipe or "mae_nano"


def refuse_settings(table: Table, request: TableRequest) -> None:
    """Raise ConfigError for settings that would be ignored, because the table or an option determines them."""
    keys = parse(request.settings)
    if request.seeds < 1:
        raise ConfigError(f"got --seeds {request.seeds}; expected at least 1")
    if "train.seed" in keys:
        raise ConfigError(
            "train.seed cannot be set: cells are trained with seeds 0, 1, ...; set their number with --seeds"
        )
    if clash := [key for key in table.varies if key in keys and not (key in LENGTHS and request.budget is None)]:
        what = f"the budget determines {clash[0]}" if clash[0] in LENGTHS else f"table {table.name} varies {clash[0]}"
        raise ConfigError(f"{clash[0]} cannot be set: {what}; leave it out")
    resolve.reject_conflicts(keys, request.budget)
    if request.from_run is not None and (learnt := [key for key in keys if not key.startswith(("data.", "train."))]):
        raise ConfigError(
            f"{learnt[0]} was set, but the run of --from is trained already, so only settings of data and train can be "
            "set; leave it out"
        )
    for cell in all_cells(table, request):
        draft_config(table, cell, request)


def all_cells(table: Table, request: TableRequest) -> tuple[Cell, ...]:
    """Return the shared runs that the table needs, and its cells that this version of unmask can train."""
    known = catalogue.all_recipes()
    cells = tuple(
        cell for cell in table.cells(base_config(table, request)) if cell.recipe is None or cell.recipe in known
    )
    if request.tokenizer is None and any(cell.tokenizer for cell in cells):
        return Cell(TOKENIZER, "the tokenizer (dVAE)", recipe=tokenizer_recipe(table, request)[0]), *cells
    if request.tokenizer is not None and not any(cell.tokenizer for cell in cells):
        raise ConfigError(f"--tokenizer was given, but no cell of table {table.name} needs a tokenizer; leave it out")
    if table.measure == "fine_tuned" and request.from_run is None:
        return Cell(PRETRAINED, "the pre-training (MAE)"), *cells
    return cells


def base_config(table: Table, request: TableRequest) -> Config:
    """Return the configuration that the cells vary: that of the recipe, or of the run that they fine-tune."""
    if table.measure != "fine_tuned":
        return catalogue.find(request.base_recipe)
    if request.from_run is None:
        return resolve.resolve_config(catalogue.find(request.base_recipe), [*table.base, *request.settings])
    run = Run.open(request.from_run)
    config, spec = read_config(run), read_plan(run).images
    data = config.data.model_copy(update={"size": spec.size, "channels": spec.channels})
    train = config.train.model_copy(update={"steps": read_plan(run).steps})
    return resolve.resolve_config(config.model_copy(update={"data": data, "train": train}), list(request.settings))


def tokenizer_recipe(table: Table, request: TableRequest) -> tuple[str, str]:
    """Return the recipe of the dVAE that is trained first, and its `data.size=...` for one code per MAE patch."""
    settings = [text for text in request.settings if table.name != "family" or not text.strip().startswith("method.")]
    config: Any = resolve.resolve_config(catalogue.find(request.base_recipe), [*table.base, *settings])
    patch, size = config.method.encoder.patch, config.data.size
    name = "dvae_small" if min(patch) >= 8 else "dvae_nano"
    dvae: Any = catalogue.find(name)
    code = dvae.method.encoder.patch
    return name, f"data.size=[{size[0] // patch[0] * code[0]},{size[1] // patch[1] * code[1]}]"


def fine_tunes(table: Table, cell: Cell) -> bool:
    """Return whether the cell is fine-tuned from another run."""
    return table.measure == "fine_tuned" and cell.name != PRETRAINED


def recipe_of(table: Table, cell: Cell, request: TableRequest) -> str:
    """Return the recipe of a cell."""
    return configure.PLAIN if fine_tunes(table, cell) else cell.recipe or request.base_recipe


def cell_settings(table: Table, cell: Cell, request: TableRequest) -> list[str]:
    """Return the settings of a cell except length and seed: those of the table, of the user, and of the cell.

    Later settings replace earlier ones. The dVAE gets only those of the user's settings that do not concern method and
    image size. A fine-tuned cell inherits all other settings from its pre-trained run.
    """
    if fine_tunes(table, cell):
        return [*(request.settings if request.from_run is not None else ()), *cell.settings]
    if cell.name == TOKENIZER:
        own = ("method.", "data.size")
        kept = [setting for setting in request.settings if not setting.strip().startswith(own)]
        return [*kept, tokenizer_recipe(table, request)[1]]
    return [*table.base, *request.settings, *cell.settings]


def draft_settings(table: Table, cell: Cell, request: TableRequest) -> list[str]:
    """Return the settings of a cell before its tokenizer is trained, with a placeholder for the tokenizer's weights."""
    settings, recipe = cell_settings(table, cell, request), recipe_of(table, cell, request)
    if not cell.tokenizer:
        return settings
    if request.tokenizer is not None:
        return resolve.settings_with_options(
            None, recipe, settings, tokenizer=request.tokenizer, palette=None, masks=None
        )
    return [*stand_in_tokenizer(recipe, settings, tokenizer_recipe(table, request)[0])[1], *settings]


def draft_config(table: Table, cell: Cell, request: TableRequest, source: Source | None = None) -> Config:
    """Build the configuration of a cell before anything is trained. Raises ConfigError if it is invalid."""
    settings = draft_settings(table, cell, request)
    if not fine_tunes(table, cell):
        resolve.draft_config(None, recipe_of(table, cell, request), settings, None)
        return resolve.resolve_config(catalogue.find(recipe_of(table, cell, request)), settings, source=source)
    classes = ["one", "other"] if source is None else source.classes
    config = resolve.resolve_config(
        configure.finetuning_config(base_config(table, request), classes), settings, source=source
    )
    resolve.require_method(config)
    return config
