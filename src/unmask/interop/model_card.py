"""The model card: what an exported model is, on what and how it was trained, how good it was, and how to load it.

Markdown with the front matter that model hubs read. All of it comes from the Run folder; what is not known (the licence
of the weights) is said to be not stated. Of where things lay on this machine only the last name is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from unmask.config import Config, method_module, task_names
from unmask.engine.load import Loaded, licence_of
from unmask.engine.plan import Plan
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.report.probe_titles import probe_title
from unmask.report.run_page import PROBES
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS
from unmask.run import Run

OTHER_TASKS = ("ae", "dae", "dvae", "igpt")  # that hide no patches
NOT_STATED = "not stated"
LEARNT = {"classify": "classification", "segment": "segmentation", "detect": "detection"}
MEASURES = {
    "accuracy": "accuracy", "mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "ap50": "AP50", "ap": "AP",
}  # fmt: skip
"""What `evals/fine-tuned.json` may hold, all shares of one; the interval is of its `metric` only."""


def model_card(run: Run, loaded: Loaded, target: ExportTarget, exported: ExportedModel, tested: str) -> str:
    """Write the Markdown of the card of an exported run.

    exported: with the path filled into its code. tested: a sentence about the check of the export.
    """
    config, plan = loaded.config, loaded.plan
    provenance = run.read("provenance.json") if (run.path / "provenance.json").exists() else {}
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
    return f"## {title}\n\n{text}\n"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def licence(run: Run) -> str:
    """Of imported weights, and what was trained from them, that of their source; of others nobody has said."""
    return licence_of(run) or f"{NOT_STATED}: fill it in before you hand them on"


def front_matter(config: Config, library: str, rights: str, *, classifies: bool) -> str:
    """YAML between dashes. Only letters that need no quoting beyond those of JSON."""
    tags = ["vision", "self-supervised-learning", "masked-image-modelling", config.method.name, "unmask"]
    if config.method.name in OTHER_TASKS:
        tags.remove("masked-image-modelling")
    lines = [
        f"library_name: {library}",
        "license: unknown" if rights.startswith(NOT_STATED) else "license: other",
        *([] if rights.startswith(NOT_STATED) else [f"license_name: {quoted(rights)}"]),
        f"pipeline_tag: {'image-classification' if classifies else 'image-feature-extraction'}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "---\n" + "\n".join(lines) + "\n---\n"


def quoted(text: str) -> str:
    return '"' + re.sub(r'["\\]', "'", text) + '"'


def what_it_is(config: Config, what: str, made: dict[str, Any]) -> str:
    """One paragraph: the model over there, and the method with its paper."""
    method = (method_module(config.method.name).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    said = [f"{sentence(what)} It comes from a run of `{config.method.name}` of unmask.", sentence(method)]
    if imported := made.get("imported"):
        said.append(f"The weights were not trained here but imported: {imported['kind']}.")
    elif config.recipe:
        said.append(f"Recipe: `{config.recipe}`.")
    for entry in config.graft:
        part = "the encoder" if entry.target == "encoder." else "all weights" if not entry.target else entry.target
        said.append(f"It started with {part} of the run `{last_name(entry.run)}`, step {entry.step}.")
    return " ".join(said) + "\n"


def last_name(path: str) -> str:
    """The last name of a path, of this system or another."""
    return PurePath(path.replace("\\", "/")).name or path


def preprocessing(config: Config, plan: Plan, *, normalises: bool) -> str:
    images, share = plan.images, config.data.crop.eval_share
    height, width = images.size
    crop = "the largest centred box of that shape" + (f", {share:g} of its sides" if share < 1 else "")
    lines = [
        f"Images of {height} x {width} pixels, {channels(images.channels)}, {images.dtype}.",
        f"In evaluation the image is {crop}, resampled bicubically with antialiasing.",
    ]
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (images.mean, images.std))
    if config.method.name == "igpt" or "colours" in config.method.model_dump().get("encoder", {}):
        lines.append("Pixels become the nearest colour of a palette; mean and standard deviation are not used.")
    elif normalises:
        lines.append(f"Give the files' own values: the model normalises them itself (mean {mean}; std {std}).")
    else:
        lines.append(f"Then `(image - mean) / std` per channel, in the files' own units: mean {mean}; std {std}.")
        if images.dtype == "uint8":
            scaled = (", ".join(f"{value / 255:.6g}" for value in each) for each in (images.mean, images.std))
            lines.append("For images scaled to 0..1 these are mean {}; std {}.".format(*scaled))
    return bullets(lines)


def channels(count: int) -> str:
    return f"{count} channel" + "s" * (count != 1)


def data(config: Config, plan: Plan, made: dict[str, Any]) -> str:
    if imported := made.get("imported"):
        files = ", ".join(f"`{file['name']}` (SHA-256 {file['sha256']})" for file in imported["files"])
        return f"Not known here: the weights came from {files}. See the page they came from."
    images = plan.images
    lines = [
        f"`{last_name(config.data.place)}`: {plan.num_images:,} images, as {images.size[0]} x {images.size[1]} "
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
    if not plan.steps:
        return "None here."
    seen = step * plan.batch_size / max(1, plan.num_images)
    lines = [
        f"{step:,} of {plan.steps:,} steps, batch {plan.batch_size}, {seen:.4g} epochs.",
        f"Peak learning rate {plan.peak_lr:.3g}, {plan.warmup_steps:,} warm-up steps.",
        f"Precision {plan.precision}, on {made.get('device') or plan.device}; seed {config.train.seed}.",
        f"{plan.parameters / 1e6:.2f} M parameters in training, {plan.encoder_parameters / 1e6:.2f} M of the encoder.",
    ]
    if versions := made.get("versions"):
        said = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"Versions: {said}" + (f"; Python {made['python']}." if "python" in made else "."))
    if git := made.get("git"):
        lines.append(f"Commit {git['commit']}{', with uncommitted changes' if git.get('changed') else ''}.")
    return bullets(lines)


def results(run: Run, *, whole: bool) -> str:
    """What `evals/` holds, as one table with 95 % intervals."""
    probes, _ = run.results(*PROBES)  # linear before knn; a damaged file is no result
    rows = [row for probe in probes.values() for row in probe_rows(probe)]
    if tuned := run.results("fine-tuned")[0].get("fine-tuned"):
        name = "this model" if whole else "this encoder, with the head that was left out"
        rows = [*tuned_rows(tuned, name), *rows]
    if not rows:
        return "Nothing was measured."
    head = ("measured", "features", "step", "measure", "value (95 % interval)")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def tuned_rows(tuned: dict[str, Any], model: str) -> list[tuple[Any, ...]]:
    """(title, features, step, measure, value) of a supervised run on its test images, what counts first."""
    metric, task = tuned.get("metric", "accuracy"), LEARNT.get(tuned.get("task", ""), "")
    title = (
        f"Fine-tuned on {last_name(tuned['data'])}" + f" for {task}" * bool(task) + f", tested on {tested_on(tuned)}"
    )
    names = [metric, *(name for name in MEASURES if name != metric and name in tuned)]
    return [
        (
            title, model, tuned.get("step"), MEASURES.get(name, name),
            interval(tuned.get(name), tuned if name == metric else {}, share=name in MEASURES),
        )
        for name in names
    ]  # fmt: skip


def probe_rows(probe: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(title, features, step, measure, value) of a probe, without those of other runs; a curve has a row a point."""
    if not {"kind", "data", "test", "rows"} <= probe.keys():
        return []
    metric, found = probe.get("metric") or "accuracy", []
    named = probe | {"data": last_name(probe["data"]), "test": tested_on(probe)}
    for part, count in (("data", probe.get("train_images")), ("test", probe.get("test_images"))):
        named[part] += f" ({count:,} images)" if count else ""  # many folders are called train
    if probe.get("targets") is not None:
        named["targets"] = last_name(probe["targets"])
    measure = f"{metric}, mean of {probe['draws']} draws" if "draws" in probe else metric
    shared = probe.get("shared") or 0
    careful = f" (careful: {shared} test images are also training images)" if shared else ""
    for row in probe["rows"]:
        if row["features"] not in (PRETRAINED, RANDOM_INIT, RAW_PIXELS):
            continue
        features = f"{row['features']}, {row['pool']}"
        for point in row.get("points", [row]):
            title = probe_title(named if "points" not in row else named | {"shots": point["shots"]})
            value = next((point[key] for key in ("accuracy", "value", "mean") if point.get(key) is not None), None)
            said = interval(value, point, share=metric == "accuracy")
            found.append((title + careful, features, probe.get("step"), measure, said))
    return found


def tested_on(measured: dict[str, Any]) -> str:
    """The test images by their last name; a held-out part of the training data keeps its words."""
    data, test = str(measured["data"]), str(measured["test"])
    if test.endswith(data) and test != data:
        return test.removesuffix(data) + last_name(data)
    return last_name(test)


def interval(value: float | None, limits: dict[str, Any], *, share: bool) -> str:
    """The value, and its limits where there are any; shares in per cent."""
    if value is None:
        return "?"
    show = "{:.1%}".format if share else "{:.3f}".format
    if limits.get("low") is None:
        return show(value)
    return f"{show(value)} ({show(limits['low'])} to {show(limits['high'])})"
