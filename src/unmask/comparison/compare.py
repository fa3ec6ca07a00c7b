"""`unmask compare`: several Runs beside one another, as one page and one JSON file.

Shows what each is and costs, and those probes that all of them share: the same labelled images, split, kind, labels per
class and seed. Numbers that are not of one measurement are named and not set beside one another. Reads the Run folders;
only with `data` does it measure, those Runs that lack the probe.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.batch import ImageSpec
from unmask.comparison.table_page import difference, last_loss, training_seconds
from unmask.config import Config, keys
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine.flops import build_unallocated, count_flops
from unmask.engine.load import read_config, read_plan
from unmask.engine.plan import Plan, example_batch
from unmask.errors import UserError
from unmask.evals.probe import KINDS, require_kind
from unmask.evals.probes.attentive import ATTENTIVE
from unmask.evals.run_probe import probe_run
from unmask.evals.statistics import POOLS, PRETRAINED
from unmask.recipes.catalogue import all_recipes
from unmask.report.run_page import page, probe_title
from unmask.run import Run, replace_file

# What two probes must have in common to be one measurement.
SAME = ("kind", "data", "test", "shots", "seed", "layer", "masks")
SAME_WITHIN = 0.01  # numbers closer than this share are the same
SINGULAR = ("image size", "training compute", "data")
LOSSES = (
    "Losses of different targets, masks or normalisations are not comparable, and a lower one is not a better encoder."
)


def compare(
    runs: Sequence[str | Path],
    *,
    data: str | None = None,
    test: str | None = None,
    kind: str = "linear",
    shots: int | None = None,
    out: str | Path = "comparison.html",
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Write `out` and the same as data beside it (.json), and return that.

    data: probe the Runs that lack this probe, on these labelled images, as `unmask probe` would. Raises ValueError for
    fewer than two Runs, one given twice, a folder that is no Run, or nowhere to write.
    """
    console = console or Console()
    out = Path(out)
    if out.suffix != ".html":
        raise UserError(f"output file {out} came; a name that ends in .html was expected")
    if not out.resolve().parent.is_dir():
        raise UserError(f"the folder {out.resolve().parent} does not exist; make it first, or choose another --out")
    if data is None and (test is not None or shots is not None):
        raise UserError("--test or --shots came without --data, so there is nothing to probe; give --data too")
    require_kind(kind, (*KINDS, ATTENTIVE))
    opened = open_runs(runs)
    if data is not None:
        want = dict(zip(SAME, (kind, data, test or f"a held-out fifth of {data}", shots, 0, None, None), strict=True))
        for run in opened.values():
            newest = checkpoint.newest_step(run)  # a probe from before more training measured another encoder
            if not any(
                probe["step"] == newest and all(probe[key] == value for key, value in want.items())
                for probe in probes(run)
            ):
                probe_run(
                    run.path, data, test=test, kind=kind, shots=shots, controls=False, seed=0, step=None, device=device,
                    console=console,
                )  # fmt: skip
    found = {name: probes(run) for name, run in opened.items()}
    rows = [about(name, run) for name, run in opened.items()]
    differing = differences(rows)
    summary = {
        "runs": rows,
        "probes": [probe | {"sentence": probe["sentence"] + caveat(differing)} for probe in shared(found)],
        "not_comparable": [*not_shared(found), *differing.values(), *damaged(opened.values())],
        "note": LOSSES,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    pictures = {name: url for name, run in opened.items() if (url := last_picture(run)) is not None}
    replace_file(out.with_suffix(".json"), json.dumps(summary, indent=2).encode("ascii") + b"\n")
    replace_file(out, page("compare.html.jinja", **summary, pictures=pictures))
    for probe in summary["probes"]:
        console.say(f"{probe['title']}: {probe['sentence']}")
    for line in summary["not_comparable"]:
        console.say(f"not comparable: {line}")
    console.say(f"comparison: {out}")
    return summary


def open_runs(runs: Sequence[str | Path]) -> dict[str, Run]:
    """By the name each has on the page: of its folder, or the whole path where two have the same."""
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run came; at least two were expected: unmask compare RUN RUN ...")
    opened = [Run.open(run) for run in runs]
    places = [run.path.resolve() for run in opened]
    if twice := [str(run.path) for run, place in zip(opened, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{twice[0]} came twice; name every run once")
    names = [place.name for place in places]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, opened, strict=True)}


def about(name: str, run: Run) -> dict[str, Any]:
    """What a Run is and what it cost."""
    config, plan = read_config(run), read_plan(run)
    status = {"state": "waiting", "step": 0} | run.status()
    trained = [row for row in run.metrics() if row.get("loss") is not None]
    flops = flops_of(config, plan.images)
    seen = status["step"] * plan.batch_size
    return {
        "name": name,
        "path": str(run.path),
        "method": config.method.name,
        "recipe": config.recipe,
        "source": config.data.place,
        "place": _place(config.data.source),
        "differs": _by_hand(config),
        "image": [plan.images.channels, *plan.images.size],
        "parameters": plan.parameters,
        "encoder_parameters": plan.encoder_parameters,
        "flops": flops,
        "state": status["state"],
        "step": status["step"],
        "steps": plan.steps,
        "images_seen": seen,
        "epochs": seen / plan.num_images if plan.num_images else 0.0,  # imported weights have seen none here
        "training_flops": None if flops["training"] is None else flops["training"] * seen,
        "images_per_second": statistics.median(row["images_per_second"] for row in trained) if trained else None,
        "seconds": training_seconds(trained),
        "loss": last_loss(trained) if trained else None,
        "device": _device(run, plan),
    }


def _place(source: str | Sequence[str]) -> list[str]:
    """Where the images are, spelled alike for every run: '/a/b/../c' and a link to /a/c are /a/c."""
    each = [source] if isinstance(source, str) else list(source)
    return [os.path.realpath(text) if os.path.isabs(text) else text for text in each]


def differences(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the runs do not have in common and a comparison of methods needs, by name, as sentences with the numbers."""
    kinds: dict[str, tuple[list[Any], list[str]]] = {
        "image size": (sizes := [row["image"][1:] for row in rows], [f"{size[0]} x {size[1]}" for size in sizes]),
        "channels": (channels := [row["image"][0] for row in rows], [str(number) for number in channels]),
        "data": ([row["place"] for row in rows], [row["source"] for row in rows]),
        "steps": (steps := [row["step"] for row in rows], [f"{number:,}" for number in steps]),
        "epochs": (epochs := [row["epochs"] for row in rows], [f"{number:.3g}" for number in epochs]),
        "images seen": (seen := [row["images_seen"] for row in rows], [f"{number:,}" for number in seen]),
        "training compute": (flops := [row["training_flops"] for row in rows], [_flops(number) for number in flops]),
        "parameters of the encoder": (
            sizes := [row["encoder_parameters"] for row in rows], [f"{number / 1e6:.2f} M" for number in sizes],
        ),
    }  # fmt: skip
    return {
        kind: f"The {kind} differ{'s' * (kind in SINGULAR)}: "
        + ", ".join(f"{row['name']} {said}" for row, said in zip(rows, words, strict=True))
        + "."
        for kind, (values, words) in kinds.items()
        if _differ(values)
    }


def _differ(values: Sequence[Any]) -> bool:
    if None in values:
        return False
    if all(isinstance(value, int | float) for value in values):
        return max(values) - min(values) > SAME_WITHIN * max(values)
    return any(value != values[0] for value in values)


def _flops(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.3g} FLOPs"


def caveat(differing: dict[str, str]) -> str:
    """What a ranking has to be read with; "" where the runs differ in nothing of that kind."""
    return f"; not a comparison of methods alone: the runs differ in {', '.join(differing)}" if differing else ""


def flops_of(config: Config, images: ImageSpec) -> dict[str, int | None]:
    """FLOPs of one image, by part; of an encoder that has no task only `whole`, the others are None."""
    if config.method.name != "encoder":
        flops = count_flops(config, images)
        return {**vars(flops), "forward": flops.forward}
    encoder = build_unallocated(config, images).encoder
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(example_batch(images, 1, "meta").images)
    none = dict.fromkeys(("encoder", "decoder", "rest", "training", "forward"))
    return {**none, "whole": counter.get_total_flops()}


def _by_hand(config: Config) -> list[str]:
    """Settings that are not the recipe's, as KEY=VALUE; [] for a recipe that is not known here."""
    if config.recipe not in (known := all_recipes()):
        return []
    base, found = known[config.recipe](), []
    both = [key for key in keys(config) if key in set(keys(base)) and key not in ("data.source", "graft")]
    for key in both:
        ours, theirs = (_value(tree, key) for tree in (config, base))
        if ours != theirs:
            found.append(f"{key}={ours}")
    return [*found, *(f"{entry.target or 'all weights'} from {entry.run}, step {entry.step}" for entry in config.graft)]


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def _device(run: Run, plan: Plan) -> str:
    machine = run.read("provenance.json").get("device") if (run.path / "provenance.json").exists() else None
    return f"{plan.precision} on {plan.device}" + (f" ({machine})" if machine else "")


def probes(run: Run) -> list[dict[str, Any]]:
    """The Run's probes, but for damaged files; of one measurement at several steps only the latest."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _, found in sorted(run.results("probe-*", "attentive-*")[0].items()):
        probe = {"layer": None, "masks": None} | found
        if all(key in probe for key in SAME):
            key = tuple(probe[name] for name in SAME)
            if key not in latest or probe["step"] > latest[key]["step"]:
                latest[key] = probe
    return list(latest.values())


def damaged(runs: Iterable[Run]) -> list[str]:
    """Results that are not shown because their files have changed since they were written."""
    return [fault for run in runs for fault in run.results("probe-*", "attentive-*")[1]]


def _measurement(probe: dict[str, Any]) -> tuple[Any, ...]:
    return (*(probe[key] for key in SAME), probe["test_images"], probe["train_images"], tuple(probe["classes"]))


def shared(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The measurements that every Run has, each with one row for a Run: the mean over patches (of a kind without it
    what there is), and all pools.

    Ranked is one pool for all: the better of two, chosen on the test images, would favour encoders with a class token.
    """
    keyed = {name: {_measurement(probe): probe for probe in each} for name, each in found.items()}
    first, *others = keyed.values()
    tables = []
    for key, probe in first.items():
        if not all(key in other for other in others):
            continue
        rows = []
        for name, each in keyed.items():
            pools = {row["pool"]: row for row in each[key]["rows"] if row["features"] == PRETRAINED}
            ranked = pools.get("mean") or next(iter(pools.values()))
            score = {part: ranked[part] for part in ("accuracy", "low", "high", "correct", "total", "pool")}
            rows.append({"name": name, "step": each[key]["step"], **score, "pools": pools})
        rows.sort(key=lambda row: -row["accuracy"])
        about_all = {part: probe[part] for part in (*SAME, "test_images", "train_images", "chance")}
        tables.append({"title": probe_title(probe), **about_all, "rows": rows, "sentence": _sentence(rows)})
    return tables


def _sentence(rows: list[dict[str, Any]]) -> str:
    """Who leads, and whom the choice of test images alone could put in front."""
    first, *others = rows
    said = f"{first['name']} leads with {first['accuracy']:.1%} ({POOLS.get(first['pool'], first['pool'])})"
    scores = [
        {"mean": row["accuracy"], "interval": "test images", "by_seed": {}, **{k: row[k] for k in ("correct", "total")}}
        for row in rows
    ]
    close = [row["name"] for row, score in zip(others, scores[1:], strict=True) if difference(scores[0], score)[1] <= 0]
    if not close:
        return said + ", by more than the choice of test images would explain; another seed of the training may differ"
    return said + f", but within the noise of the test images lie {', '.join(close)}"


def not_shared(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for every measurement that only some of the Runs have."""
    names: dict[tuple[Any, ...], list[str]] = {}
    titles: dict[tuple[Any, ...], str] = {}
    for name, each in found.items():
        for probe in each:
            names.setdefault(_measurement(probe), []).append(name)
            titles[_measurement(probe)] = probe_title(probe)
    lines = [
        f"{titles[key]} ({key[len(SAME)]} test images) was measured for {', '.join(have)} only."
        for key, have in names.items()
        if len(have) < len(found)
    ]
    if not any(len(have) == len(found) for have in names.values()):
        lines.append(
            "No probe is shared by all of these runs, so nothing says which features are better; measure one with: "
            "unmask compare RUN... --data DATA --test DATA"
        )
    return lines


def last_picture(run: Run) -> str | None:
    """The newest picture as a data URL."""
    files = sorted(run.pictures.glob("step-*.png"))
    return "data:image/png;base64," + base64.b64encode(files[-1].read_bytes()).decode("ascii") if files else None
