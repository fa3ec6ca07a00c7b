"""Write the model card of an exported run: description, training, results, and how to load it.

The card is Markdown with the front matter that model hubs read. All facts come from the run folder; unknown facts
(often the licence of the weights) are marked as not stated. Paths are shortened to their last part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from unmask.config import Config, method_class, method_module, task_class, task_names
from unmask.engine.load import Loaded, licence_of
from unmask.engine.training_plan import Plan
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.report.probe_section import ImageNames, title_with
from unmask.results import (
    ACCURACY,
    CONTROLS,
    PRETRAINED,
    CurveResult,
    FeatureMeasurement,
    FinetuneResult,
    ProbeResult,
    read_results,
    show_score,
)
from unmask.run import PROVENANCE, Run

NOT_STATED = "not stated"
OWN_FEATURES = (PRETRAINED, *CONTROLS)
"""Feature sets whose scores the card shows; those of other runs are left out."""


@dataclass(frozen=True)
class ResultRow:
    """A row of the table of results."""

    measured: str
    features: str
    step: int | None
    metric: str
    value: str


def model_card(run: Run, loaded: Loaded, target: ExportTarget, exported: ExportedModel, tested: str) -> str:
    """Write the Markdown of the card of an exported run.

    exported: the export, whose loading code must contain the final path. tested: a sentence about the check of the
    export.
    """
    config, plan = loaded.config, loaded.plan
    provenance = run.read_if_present(PROVENANCE)
    parts = [
        front_matter(config, target.library_name, licence(run), classifies=exported.classifies),
        f"# {run.path.resolve().name}\n",
        what_it_is(config, exported.what, provenance),
        section("How to load it", f"```python\n{exported.load}\n```\n\n{exported.returns}"),
        section("Preprocessing", preprocessing(config, plan, normalises=target.normalises)),
        section("Data", data(config, plan, provenance)),
        section("Training", training(config, plan, provenance, loaded.step)),
        section("Results", results(run, whole=exported.classifies or target.keeps_task)),
        section("This export", bullets([*(sentence(note) for note in exported.notes), sentence(tested)])),
        section("Licence of the weights", sentence(licence(run))),
    ]
    return "\n".join(parts)


def section(title: str, text: str) -> str:
    """Write a section of the card."""
    return f"## {title}\n\n{text}\n"


def bullets(lines: Iterable[str]) -> str:
    """Write a bullet list."""
    return "\n".join(f"- {line}" for line in lines)


def sentence(text: str) -> str:
    """Write a text as a sentence, with a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def licence(run: Run) -> str:
    """Return the licence of imported weights, also for runs trained from them; for other runs, that none is stated."""
    return licence_of(run) or f"{NOT_STATED}: add it before you share them"


def front_matter(config: Config, library: str, rights: str, *, classifies: bool) -> str:
    """Return the YAML front matter that model hubs read."""
    masks = ["masked-image-modelling"] if method_class(config.method.name).hides_patches else []
    stated = not rights.startswith(NOT_STATED)
    card = ModelCardData(
        library_name=library,
        license="other" if stated else "unknown",
        license_name=rights if stated else None,
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags=["vision", "self-supervised-learning", *masks, config.method.name, "unmask"],
    )
    return f"---\n{card.to_yaml()}\n---\n"


def what_it_is(config: Config, what: str, made: dict[str, Any]) -> str:
    """Describe the model and its method in one paragraph."""
    method = (method_module(config.method.name).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    sentences = [
        f"{sentence(what)} It comes from an unmask run of the method `{config.method.name}`.",
        sentence(method),
    ]
    if imported := made.get("imported"):
        sentences.append(f"The weights were not trained here but imported: {imported['kind']}.")
    elif config.recipe:
        sentences.append(f"Recipe: `{config.recipe}`.")
    for entry in config.graft:
        part = "the encoder" if entry.target == "encoder." else "all weights" if not entry.target else entry.target
        sentences.append(f"It started with {part} of the run `{last_name(entry.run)}`, step {entry.step}.")
    return " ".join(sentences) + "\n"


def last_name(path: str) -> str:
    """Return the last part of a path, with the separators of any operating system."""
    return PurePath(path.replace("\\", "/")).name or path


def preprocessing(config: Config, plan: Plan, *, normalises: bool) -> str:
    """Describe size, crop and normalisation of the images."""
    images, share = plan.images, config.data.crop.eval_share
    height, width = images.size
    crop = "the largest centred crop of this shape" + (f", scaled to {share:g} of its sides" if share < 1 else "")
    lines = [
        f"Images of {height} x {width} pixels, {channels(images.channels)}, {images.dtype}.",
        f"In evaluation, the input is {crop}, resampled bicubically with antialiasing.",
    ]
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (images.mean, images.std))
    if config.method.name == "igpt" or "colours" in config.method.model_dump().get("encoder", {}):
        lines.append(
            "Pixels are replaced by the nearest colour of a palette; mean and standard deviation are not used."
        )
    elif normalises:
        lines.append(f"Pass the files' own pixel values: the model normalises them itself (mean {mean}; std {std}).")
    else:
        lines.append(
            f"Normalise with `(image - mean) / std` per channel, in the files' own units: mean {mean}; std {std}."
        )
        if images.dtype == "uint8":
            scaled = (", ".join(f"{value / 255:.6g}" for value in each) for each in (images.mean, images.std))
            lines.append("For images scaled to 0..1, use mean {}; std {}.".format(*scaled))
    return bullets(lines)


def channels(count: int) -> str:
    """Write a number of channels in words, such as "3 channels"."""
    return f"{count} channel" + "s" * (count != 1)


def data(config: Config, plan: Plan, made: dict[str, Any]) -> str:
    """Describe the training images."""
    if imported := made.get("imported"):
        files = ", ".join(f"`{file['name']}` (SHA-256 {file['sha256']})" for file in imported["files"])
        return (
            f"The training images are not known: the weights were imported from {files}. See the page from which they "
            "were downloaded."
        )
    images = plan.images
    lines = [
        f"`{last_name(config.data.place)}`: {plan.num_images:,} images, used at {images.size[0]} x {images.size[1]} "
        f"pixels, {channels(images.channels)}, {images.dtype}.",
    ]
    settings = config.method.model_dump()
    if config.method.name in task_names() and settings.get("classes"):
        names = [str(name) for name in settings["classes"]]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        lines.append(f"{len(names)} classes: {', '.join(names[:20])}{more}.")
    else:
        lines.append("Labels were not used.")
    return bullets(lines)


def training(config: Config, plan: Plan, made: dict[str, Any], step: int) -> str:
    """Describe the length, learning rate, machine and versions of the training."""
    if not plan.steps:
        return "The weights were not trained with unmask."
    seen = step * plan.batch_size / max(1, plan.num_images)
    lines = [
        f"{step:,} of {plan.steps:,} steps, batch {plan.batch_size}, {seen:.4g} epochs.",
        f"Peak learning rate {plan.peak_lr:.3g}, {plan.warmup_steps:,} warm-up steps.",
        f"Precision {plan.precision}, on {made.get('device') or plan.device}; seed {config.train.seed}.",
        f"{plan.parameters / 1e6:.2f} M parameters in training, of which {plan.encoder_parameters / 1e6:.2f} M in the "
        "encoder.",
    ]
    if versions := made.get("versions"):
        names = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"Versions: {names}" + (f"; Python {made['python']}." if "python" in made else "."))
    if git := made.get("git"):
        lines.append(f"Commit {git['commit']}{', with uncommitted changes' if git.get('changed') else ''}.")
    return bullets(lines)


def results(run: Run, *, whole: bool) -> str:
    """Return the results as a table with 95% intervals. whole: whether the head of a fine-tuned run is exported."""
    found = read_results(run)
    rows = [row for probe in found.probes for row in probe_rows(probe)]
    rows += [row for curve in found.curves for row in curve_rows(curve)]
    if found.finetuned is not None:
        model = "this model" if whole else "this encoder with its head, which is not exported"
        rows = [*finetune_rows(found.finetuned, model), *rows]
    if not rows:
        return "Nothing was measured."
    head = ("measured", "features", "step", "metric", "value (95% interval)")
    lines = [head, ("---",) * len(head), *((r.measured, r.features, r.step, r.metric, r.value) for r in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def finetune_rows(result: FinetuneResult, model: str) -> list[ResultRow]:
    """Return a row for every metric of a fine-tuned run on its test images, the main metric first."""
    task = f" for {task_class(result.task).title}" if result.task in task_names() else ""
    data = last_name(str(result.data))
    title = f"Fine-tuned on {data}{task}, tested on {test_name(result)}"
    return [
        ResultRow(
            measured=title,
            features=model,
            step=result.step,
            metric=words,
            value=_headline(result) if name == result.metric else show_score(result.numbers[name], ACCURACY),
        )
        for name, words in result.metric_words.items()
    ]


def _headline(result: FinetuneResult) -> str:
    return show_value(result.value, result.low, result.high, ACCURACY)


def probe_rows(probe: ProbeResult) -> list[ResultRow]:
    """Return a row for every feature set of a probe."""
    title = measured_title(probe)
    return [
        ResultRow(
            measured=title,
            features=f"{row.features}, {row.pool}",
            step=probe.step,
            metric=probe.metric,
            value=show_value(row.value, row.low, row.high, probe.metric),
        )
        for row in probe.rows
        if row.features in OWN_FEATURES
    ]


def curve_rows(curve: CurveResult) -> list[ResultRow]:
    """Return a row for every point of a label-budget curve."""
    metric = f"{curve.metric}, mean"
    return [
        ResultRow(
            measured=measured_title(replace(curve, shots=(point.shots,))),
            features=f"{row.features}, {row.pool}",
            step=curve.step,
            metric=metric,
            value=show_value(point.mean, point.low, point.high, curve.metric),
        )
        for row in curve.rows
        if row.features in OWN_FEATURES
        for point in row.points
    ]


def measured_title(record: FeatureMeasurement) -> str:
    """Return the title of a measurement as in the report, with paths shortened to names and with numbers of images."""

    def counted(name: str, images: int) -> str:
        return f"{name} ({images:,} images)" if images else name

    names = ImageNames(
        data=counted(last_name(str(record.data)), record.train_images),
        test=counted(test_name(record), record.test_images),
        targets=last_name(record.targets.path) if record.targets is not None else "",
    )
    careful = f" (careful: {record.shared} test images are also training images)" if record.shared else ""
    return title_with(record, names) + careful


def test_name(record: FeatureMeasurement | FinetuneResult) -> str:
    """Describe the test images by the last part of their path, or as a part of the training images."""
    if record.test.images is not None:
        return last_name(str(record.test.images))
    return record.test.describe(last_name(str(record.data)))


def show_value(value: float, low: float | None, high: float | None, metric: str) -> str:
    """Format a value, with its interval if there is one. Accuracies are shown in percent."""
    if low is None or high is None:
        return show_score(value, metric)
    return f"{show_score(value, metric)} ({show_score(low, metric)} to {show_score(high, metric)})"
