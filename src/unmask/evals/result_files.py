"""Write the result of a probe to RUN/evals/NAME.json, where the name describes the measurement."""

from __future__ import annotations

from pathlib import Path

from unmask.errors import UserError
from unmask.evals.probe_options import DEFAULT_DRAWS, ProbeOptions
from unmask.results import CurveResult, FeatureMeasurement, ProbeResult, from_json, to_json
from unmask.run import Run
from unmask.system.plain_names import plain_name


def save_result(run: Run, result: ProbeResult | CurveResult, options: ProbeOptions) -> str:
    """Write a result to its file, and return the name of the file without .json.

    An earlier result for the same images is replaced. If the file has a result for other images (many image folders are
    named train), a number is appended to the name of the new file.
    """
    name = file_name(result, options)
    number, free = 1, name
    while (run.evals / f"{free}.json").exists() and not _is_replaceable(run, free, result):
        number, free = number + 1, f"{name}-{number + 1}"
    run.write(f"evals/{free}.json", to_json(result))
    return free


def _is_replaceable(run: Run, name: str, result: ProbeResult | CurveResult) -> bool:
    """Whether the existing file may be replaced: it is damaged, or its images have the same paths."""
    try:
        before = from_json(run.read(f"evals/{name}.json"))
    except UserError:
        return True
    return isinstance(before, FeatureMeasurement) and _places(before) == _places(result)


def _places(result: FeatureMeasurement) -> tuple[str | None, ...]:
    images = (result.data, result.test.images)
    return tuple(None if each is None else each.path or each.name for each in images)


def file_name(result: ProbeResult | CurveResult, options: ProbeOptions) -> str:
    """Return the file name of a result: kind of probe, images, and every option that differs from the default."""
    first = "probe"
    if isinstance(result, CurveResult):
        first = "curve"
    elif result.targets is not None:
        first = "targets"
    parts = [first, result.kind, plain_name(str(result.data)) or "data"]
    if result.budgets is not None:
        parts += [*(str(number) for number in result.budgets), "shots"]
    if isinstance(result, CurveResult) and result.draws != DEFAULT_DRAWS:
        parts += [str(result.draws), "draws"]
    if options.step is not None:
        parts += ["step", str(options.step)]
    if result.seed:
        parts += ["seed", str(result.seed)]
    if result.layer is not None:
        parts += ["layer", result.layer]
    if result.mask_votes is not None:
        parts += ["masks", str(result.mask_votes)]
    if options.test is not None:
        parts += ["on", plain_name(options.test)]
    if result.targets is not None:
        columns = result.targets.columns or ()
        parts += ["by", plain_name(Path(result.targets.path).stem), *map(plain_name, columns), result.task]
    return "-".join(parts)
