"""`--resume auto`: repeat a command, and it continues the run that it began.

A run records in `provenance.json` what its command asked for (`Request`), and the facts about the images from which
settings were chosen (`ChosenFrom`). A command with the same request continues the run; this neither scans images nor
reads other runs. For a different request, the settings are resolved as the command would resolve them, but from the
recorded facts, and compared with the settings of the run. A value that `unmask set` has replaced since the run began
agrees too, so a job that repeats its command does not undo such a change. Settings in `FREE` may differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from unmask.config import Config, ConfigError, keys, parse
from unmask.console import Console, duration
from unmask.data.scan.scan import Scan
from unmask.data.sources import embedded
from unmask.engine import edit_run
from unmask.engine.load import read_config, read_plan
from unmask.engine.time_budget import Budget
from unmask.engine.world import current
from unmask.run import EDITS, PLAN, PROVENANCE, Run, RunError

REQUEST, CHOSEN_FROM = "request", "chosen_from"
"""Keys of provenance.json."""
FREE = (
    *(key for key in edit_run.INEXACT if key not in ("train.precision", "train.micro_batch")),
    "data.workers", "data.cache_gib", "data.max_bad_fraction", "train.log_every", "train.checkpoint_every",
    "train.checkpoint_minutes", "train.keep_checkpoints", "train.picture_every", "train.picture_images",
)  # fmt: skip
"""Settings that may differ from those of the run, because they change its results by rounding at most.

train.precision and train.micro_batch must agree: rounding to bfloat16 is not negligible, and mixup draws its pairs
within a micro-batch.
"""
RESOLVED = ("settings", "recipe", "config", "from_run", "tokenizer", "palette", "masks", "task", "last_blocks",
            "from_scratch", "steps_of")  # fmt: skip
"""Options that determine the configuration, and are compared by the configuration that results from them."""
LOCATIONS = ("config", "from_run", "tokenizer", "palette", "masks", "test", "annotations", "test_annotations",
             "steps_of", "names")  # fmt: skip
"""Options that are paths; a relative path agrees with the absolute path of the same file."""
FLAGS = {"ignored": "--ignore", "mask_options": "--mask-values, --class-names"}
"""Names on the command line of options that have another name here."""
LONGEST = 60  # characters of a value in a message


class RequestDiffers(ConfigError):
    """Raised if a command asks for other settings than those of the run that it would continue."""


@dataclass(frozen=True)
class ChosenFrom:
    """The facts from which settings of a run were chosen; attributes as in `Scan`.

    labelled: number of labelled training images of a supervised run, else 0. device: where the run trains.
    """

    usable: int
    median_size: tuple[int, int]
    sampled: bool
    labelled: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Request:
    """What a command asks for, as JSON values with absolute paths.

    verb: name of the verb. data: locations of the images. budget: seconds, or None. options: values of all other
    options that affect results.
    """

    verb: str
    data: list[str]
    budget: float | None
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        verb: str,
        data: str | Path | Sequence[str | Path],
        budget: Budget | None,
        options: Any,
        *,
        from_run: str | Path | None = None,
    ) -> Self:
        """Return the request of a command. options: a dataclass. from_run: the run, if it is no option."""
        places = [data] if isinstance(data, str | Path) else data
        values = _values(options) if from_run is None else _values(options) | {"from_run": from_run}
        plain = {name: _plain(value, name) for name, value in values.items()}
        plain["settings"] = parse(plain["settings"])
        return cls(verb, [_location(str(place)) for place in places], budget and budget.seconds, plain)

    def record(self, found: Scan, *, labelled: int = 0) -> dict[str, Any]:
        """Return the entries for provenance.json of a run that this request begins."""
        facts = {"usable": found.usable, "median_size": list(found.median_size), "sampled": found.sampled}
        return {REQUEST: asdict(self), CHOSEN_FROM: facts | {"labelled": labelled}}


class Differing(NamedTuple):
    """A setting or option, as text, that differs: the value asked for and the value of the run."""

    key: str
    asked: str
    found: str


def run_to_continue(
    out: str | Path | None, request: Request, resolve: Callable[[Config, ChosenFrom], Config], console: Console
) -> Path | None:
    """Return the path of the run in `out` if this request began it or has the same settings, else None.

    None means that a new run can begin there.

    resolve: function of the run's configuration and facts that returns the configuration of the command. Settings in
    FREE that the command sets to other values are changed in the run. Raises RequestDiffers, RunError, UserError.
    """
    return current().from_writer(lambda: _run_to_continue(out, request, resolve, console))


def _run_to_continue(
    out: str | Path | None, request: Request, resolve: Callable[[Config, ChosenFrom], Config], console: Console
) -> Path | None:
    if out is None:
        raise ConfigError("got --resume auto without --out; give the run folder to begin or continue: --out RUN")
    if not (Path(out) / PLAN).exists():
        Run.check_free(out)
        return None
    run = Run.open(out)
    made = run.read(PROVENANCE)
    if REQUEST not in made or CHOSEN_FROM not in made:
        raise RunError(
            f"{out} is a run without a record of its command (imported, or begun by an earlier version), so --resume "
            f"auto cannot compare the settings; continue it with: unmask resume {out}, or choose another --out"
        )
    before, config, plan = Request(**made[REQUEST]), read_config(run), read_plan(run)
    if request == before:
        return run.path
    if request.verb != before.verb:
        raise RequestDiffers(
            f"got unmask {request.verb} --out {out}, but the run in {out} was begun by unmask {before.verb}; choose "
            "another --out"
        )
    facts = made[CHOSEN_FROM] | {"median_size": tuple(made[CHOSEN_FROM]["median_size"]), "device": plan.device}
    edits = [edit["changes"] for edit in made.get(EDITS, [])]
    differing = _options_that_differ(request, before, config, plan.budget)
    if differing:  # the other settings may depend on them
        raise RequestDiffers(_refusal(differing, run))
    new = resolve(config, ChosenFrom(**facts))
    if differing := _settings_that_differ(new, config, edits):
        raise RequestDiffers(_refusal(differing, run))
    _apply_free(request, new, config, run, console)
    return run.path


def _options_that_differ(request: Request, before: Request, config: Config, budget: float | None) -> list[Differing]:
    """Return the options that differ, except those that only determine the configuration."""
    found = []
    now = config.data.source
    places = [before.data, [now] if isinstance(now, str) else list(now)]  # the data may have moved: resume --data
    if request.data not in places:
        found.append(Differing("data", ", ".join(request.data), ", ".join(places[-1])))
    if request.budget not in (before.budget, budget):
        found.append(Differing("--budget", *(_seconds(value) for value in (request.budget, before.budget))))
    for name in request.options:
        asked, had = request.options[name], before.options.get(name)
        if name not in RESOLVED and asked != had:
            flag = FLAGS.get(name) or f"--{name.replace('_', '-')}"
            found.append(Differing(flag, *("none" if value in (None, []) else _text(value) for value in (asked, had))))
    return found


def _settings_that_differ(new: Config, config: Config, edits: list[Mapping[str, Any]]) -> list[Differing]:
    """Return the settings of `new` that are neither those of the run nor earlier values that `unmask set` replaced."""
    if new.method.name != config.method.name:
        pairs = {"recipe": (new.recipe, config.recipe), "method.name": (new.method.name, config.method.name)}
        return [Differing(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]
    asked, found = _flat(new), _flat(config)
    differing = []
    for key, value in asked.items():
        had = [found.get(key), *(edit[key][0] for edit in edits if key in edit)]
        if key not in FREE and value not in had:
            differing.append(Differing(key, _text(value), _text(found.get(key))))
    return differing


def _flat(config: Config) -> dict[str, Any]:
    """Return {key: value} of all settings that are compared, without origins and without locations of data."""
    ignored = ("recipe", "data.source", "data.exclude", "data.test", "data.annotations", "data.test_annotations",
               "data.test_split")  # fmt: skip
    found = {key: edit_run.value_of(config, key) for key in keys(config) if key not in ignored}
    if config.train.steps is not None:
        found["train.epochs"] = None  # steps take precedence
    # The step is that of the newest checkpoint of the other run when this run began.
    found["graft"] = [{key: value for key, value in each.items() if key != "step"} for each in found["graft"]]
    return found


def _apply_free(request: Request, new: Config, config: Config, run: Run, console: Console) -> None:
    """Change the settings in FREE that the command sets explicitly."""
    asked, found = _flat(new), _flat(config)
    changes = {key: asked[key] for key in request.options["settings"] if key in FREE and asked[key] != found[key]}
    if not changes or run.finished:
        return
    settable = {key: value for key, value in changes.items() if edit_run.is_settable(key)}
    if settable:
        edit_run.set_values(run.path, [f"{key}={edit_run.text_of(value)}" for key, value in settable.items()])
    for key, value in changes.items():
        effect = f"{_text(found[key])} -> {_text(value)}" if key in settable else "only has an effect when a run begins"
        console.print(f"{key}: {effect}")


def _refusal(differing: list[Differing], run: Run) -> str:
    asked, found = (
        ", ".join(f"{each.key}={value}" if not each.key.startswith("--") else f"{each.key} {value}" for each, value in
                  zip(differing, values, strict=True))
        for values in ([each.asked for each in differing], [each.found for each in differing])
    )  # fmt: skip
    keys = [each.key for each in differing]
    ways = [f"use the same value{'s' * (len(differing) > 1)}", "another --out"]
    if all("." in key and edit_run.is_settable(key) for key in keys):
        ways.append(f"unmask set {run.path} " + " ".join(f"{each.key}={each.asked}" for each in differing))
    if keys == ["data"]:
        ways.append(f"if the images have moved: unmask resume {run.path} --data {differing[0].asked}")
    return f"got {asked}; the run in {run.path} has {found}; {', '.join(ways[:-1])}, or {ways[-1]}"


def _seconds(budget: float | None) -> str:
    return "none" if budget is None else duration(budget)


def _text(value: Any) -> str:
    text = edit_run.text_of(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _values(options: Any) -> dict[str, Any]:
    """Return the options that may affect results."""
    outside = ("console", "data", "out", "budget", "resume", "run")
    return {each.name: getattr(options, each.name) for each in fields(options) if each.name not in outside}


def _plain(value: Any, name: str) -> Any:
    """Return a value of an option as JSON, with absolute paths."""
    if is_dataclass(value):
        return {each: _plain(part, each) for each, part in _values(value).items()}
    if isinstance(value, str | Path):
        return _location(str(value)) if name in LOCATIONS else str(value)
    return [_plain(each, name) for each in value] if isinstance(value, Sequence) else value


def _location(text: str) -> str:
    return text if embedded.OPENER.opens(text) else os.path.abspath(text)
