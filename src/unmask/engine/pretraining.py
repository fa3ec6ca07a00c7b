"""Pre-train on a folder of images: combine settings, scan files, and start the run.

Settings are checked before any file is read, files are checked before the plan is made, and the plan is printed before
the first step. `engine/start_run.py` makes the plan and trains; `engine/continue_run.py` continues a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from unmask.config import Config, ConfigError, parse
from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine import continue_run, initial_weights
from unmask.engine.continue_or_start import ChosenFrom, Request, run_to_continue
from unmask.engine.device import choose_device
from unmask.engine.divided_scan import read_as
from unmask.engine.pretrain_options import PretrainOptions
from unmask.engine.resolve import (
    Facts,
    choose_config,
    config_of_run,
    draft_config,
    reject_supervised,
    reject_two_sources_of_settings,
    resolve_config,
    settings_with_options,
)
from unmask.engine.start_run import start_run
from unmask.engine.time_budget import Budget, as_budget
from unmask.engine.training_data import (
    TrainingRequest,
    odd_image_warnings,
    scan_source,
    skipped_files,
)
from unmask.engine.world import together
from unmask.nn.default_dtype import float32_default
from unmask.run import Run


@together
@float32_default()
def pretrain(
    data: str | Path | Sequence[str | Path],
    options: PretrainOptions | None = None,
    *,
    out: str | Path | None = None,
    budget: float | str | Budget | None = None,
    resume_auto: bool = False,
    console: Console | None = None,
) -> Run:
    """Pre-train on the images of `data` and return the run, which is finished or was stopped (see `run.status()`).

    data: one source or several. out: a new folder (None: named after data and recipe). budget: seconds, or a time such
    as "30m", for this whole call; the number of steps is adapted to the speed of training. resume_auto: whether to
    continue the run in `out` if this call began it (`engine/continue_or_start.py`). console: prints messages and
    progress; `Console(quiet=True)` prints only warnings. Raises UserError. Invalid settings are reported before any
    image is opened.
    """
    options, console, budget = options or PretrainOptions(), console or Console(), as_budget(budget)
    asked = Request.of("pretrain", data, budget, options)
    if resume_auto and (begun := run_to_continue(out, asked, partial(choose_again, options, budget), console)):
        return continue_run.resume(begun, console=console)
    recipe, from_run = options.recipe, options.from_run
    base = base_of(options)
    settings = settings_of(options, base)
    draft = draft_config(base, recipe, settings, budget)
    reject_supervised(draft, from_run)
    if from_run is not None and (own := sorted({"data.mean", "data.std"} & set(parse(settings)))):
        raise ConfigError(f"{own[0]} cannot be set: the weights of --from include their normalisation; leave it out")
    device = choose_device(draft.train.device)
    if out is not None:
        Run.check_free(out)
    source = read_as(open_source(data, options.exclude), draft.data.reading)
    console.print(f"{source.name}: {len(source)} images found" + skipped_files(source))
    source, found = scan_source(source, draft, console)
    for line in odd_image_warnings(source, found):
        console.warn(line)
    chosen, reasons = choose(options, base, settings, found, device=device, budget=budget, source=source)
    request = TrainingRequest(
        source=source,
        scan=found,
        config=chosen,
        device=device,
        budget=budget,
        reasons=reasons,
        record=asked.record(found),
    )
    return start_run(request, out=out, console=console)


def choose(
    options: PretrainOptions,
    base: Config | None,
    settings: list[str],
    found: Facts,
    *,
    device: str,
    budget: Budget | None,
    source: Source | None = None,
) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration for images with the facts `found`, and the reasons for choices. Raises ConfigError.

    base, settings: results of `base_of` and `settings_of`.
    """
    if base is None:
        config, reasons, _ = choose_config(source, found, options.recipe, settings, device, budget=budget)
        return config, reasons
    origin = f"settings of {options.config}" if options.from_run is None else f"weights of {options.from_run}"
    return resolve_config(base, settings, budget=budget, source=source), (origin,)


def choose_again(options: PretrainOptions, budget: Budget | None, config: Config, found: ChosenFrom) -> Config:
    """Return the configuration that these options choose for the images of a run with these facts."""
    base = base_of(options)
    settings = settings_of(options, base)
    draft_config(base, options.recipe, settings, budget)
    return choose(options, base, settings, found, device=found.device, budget=budget)[0]


def base_of(options: PretrainOptions) -> Config | None:
    """Return the configuration that `config` or `from_run` selects in place of a recipe, or None. Raises UserError."""
    if options.config is not None:
        reject_two_sources_of_settings(options.recipe, options.from_run)
        return config_of_run(options.config)
    return None if options.from_run is None else initial_weights.continued(options.from_run, options.recipe)


def settings_of(options: PretrainOptions, base: Config | None) -> list[str]:
    """Return the settings of the options, preceded by the settings that other options imply. Raises ConfigError."""
    return settings_with_options(
        base,
        options.recipe,
        list(options.settings),
        weights=options.from_run is not None,
        tokenizer=options.tokenizer,
        palette=options.palette,
        masks=options.masks,
    )
