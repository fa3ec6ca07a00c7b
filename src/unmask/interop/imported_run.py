"""Write a run of imported weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.batch import ImageSpec
from unmask.config import ENCODER, Config, task_names
from unmask.console import Console
from unmask.data.decode.reading import Reading
from unmask.engine import checkpoint, provenance
from unmask.engine.fixed_tensors import save_fixed
from unmask.engine.training_plan import Plan
from unmask.interop.foreign.state_dicts import Recognised
from unmask.method import Method
from unmask.run import CONFIG, PLAN, PROVENANCE, Run


@dataclass(frozen=True)
class ImportedModel:
    """A method and the imported weights that fit it. images: specification of the images it was trained on."""

    config: Config
    images: ImageSpec
    method: Method
    weights: dict[str, Tensor]


def write_run(out: str | Path, model: ImportedModel, reasons: tuple[str, ...], about: dict[str, Any]) -> Run:
    """Write the folder of a run with imported weights. about: origin of the weights, for provenance.json."""
    config, method, weights = model.config, model.method, model.weights
    counts = [sum(p.numel() for p in part.parameters()) for part in (method, method.encoder)]
    plan = plan_of(config, model.images, counts, reasons)
    files = {
        CONFIG: config.model_dump(mode="json"),
        PROVENANCE: provenance.provenance(plan) | {"imported": about},
        PLAN: plan.model_dump(mode="json"),
    }

    def fill(run: Run) -> None:
        checkpoint.check_space(run, sum(value.nbytes for value in weights.values()))
        fixed = {name: value for name, value in weights.items() if name.startswith(method.fixed)}
        if fixed:
            save_fixed(run, fixed)
        changing = {name: value.clone() for name, value in weights.items() if name not in fixed}
        checkpoint.save(run, 0, model=changing, optim={}, state={"step": 0})

    with Run.begin(out, files, fill=fill) as run:
        run.set_status("finished", 0, total=0)
    return run


def plan_of(config: Config, images: ImageSpec, counts: list[int], reasons: tuple[str, ...]) -> Plan:
    """Return the plan of an imported run, which is finished at step 0 and has no training images."""
    return Plan(
        steps=0, warmup_steps=0, batch_size=config.train.batch_size, micro_batch=config.train.batch_size,
        accumulation=1, peak_lr=0.0, final_lr=0.0, epochs=0.0, num_images=0, images=images, fingerprint="",
        precision="fp32", device="cpu", workers=0, cached=False, picture_every=1, parameters=counts[0],
        encoder_parameters=counts[1], reasons=reasons, reading=Reading(),
    )  # fmt: skip


def report_import(
    run: Run, found: Recognised, model: ImportedModel, changes: list[str], *, by_hand: bool, console: Console
) -> None:
    """Print what was imported, how it was changed, its assumed settings and licence, and commands that accept it."""
    config, images = model.config, model.images
    name = config.method.name
    for line in (*found.notes, *changes):
        console.print(f"  {line}")
    share = config.data.crop.eval_share
    console.print(
        "  evaluation crop: "
        + ("the largest centred box" if share == 1 else f"{share:.4g} of the shorter side, centred")
        + ", unless imported with --set data.crop.eval_share=SHARE"
    )
    for part, settings in (("encoder", found.method.get("encoder")), ("decoder", found.method.get("decoder"))):
        if settings and "heads" in settings:
            console.print(f"  {part}: {settings['heads']} heads of width {settings['width'] // settings['heads']}")
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (images.mean, images.std))
    if name != "igpt" and "colours" not in found.method["encoder"]:
        whose = "set by hand" if by_hand else found.statistics
        console.print(
            f"  normalisation: mean {mean}, std {std} ({whose}); if another one was used in training, import "
            "again with --set data.mean=[...] --set data.std=[...]"
        )
    console.print(f"  licence of the weights: {found.licence}")
    console.print(f"{run.path}: {use_of(name)}")


def use_of(method: str) -> str:
    """Name the commands that accept a run of this method."""
    if method == ENCODER:
        return (
            "embed, probe and finetune accept this run; to train it further, use `unmask pretrain DATA --from` with "
            "--recipe"
        )
    if method in task_names():
        return f"fine-tuned to {method}: embed, predict, probe and finetune accept this run"
    return f"a complete {method}: embed, probe, reconstruct, finetune and `unmask pretrain DATA --from` accept this run"
