"""Run MAE's linear probe by the paper's protocol, which trains a linear head (He et al. 2021, Table 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from unmask.config import ConfigError, parse
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine.load import read_plan
from unmask.engine.world import current, together
from unmask.finetuning.annotated import (
    open_annotated,
    split_rows,
)
from unmask.finetuning.finetune_run import FinetuneOptions, finetune
from unmask.nn.default_dtype import float32_default
from unmask.results import PRETRAINED, FeatureScore, ProbeResult, read_score, to_json
from unmask.run import Run
from unmask.system.atomic_files import free_path

PROBE = "linear_probe"
PAPER_BATCH, PAPER_PEAK = 16_384, 6.4


@together
@float32_default()
def paper_linear(
    from_run: str | Path,
    data: str,
    *,
    test: str | None = None,
    shots: int | None = None,
    settings: Sequence[str] = (),
    console: Console | None = None,
) -> ProbeResult:
    """Train MAE's linear probe (`tasks/linear_probe.py`); write the result to evals/probe-paper-linear-*.json and
    return it.

    The probe is trained in its own run inside `from_run`. The paper's batch size of 16384 suits data sets as large as
    ImageNet. For smaller data sets, the batch size is the largest power of two up to an eighth of the number of images,
    and the peak learning rate stays 6.4. It is not scaled down with the batch size, because LARS moves a matrix by a
    share of its norm in each step, and with a small rate the probe would not learn.
    """
    console = console or Console()
    outer, name = Run.open(from_run), "paper-linear-" + (Path(data).name or "data").replace(".", "-")
    name += "" if shots is None else f"-{shots}-shots"
    annotated = open_annotated(PROBE, data)
    rows, _ = split_rows(annotated, shots, hold=test is None)
    settings = list(settings)
    if "train.batch_size" not in parse(settings) and len(rows) < 8 * PAPER_BATCH:
        batch = 2 ** int(math.log2(max(16, len(rows) // 8)))
        settings.append(f"train.batch_size={batch}")
        rate = "the given learning rate"
        if "optim.base_lr" not in parse(settings):
            settings.append(f"optim.base_lr={PAPER_PEAK * 256 / batch}")
            rate = f"the paper's peak learning rate of {PAPER_PEAK}"
        console.print(
            f"batch size {batch} with {rate}: the paper's batch size of {PAPER_BATCH} is too large for {len(rows)} "
            "images"
        )
    place = current().from_writer(lambda: free_path(outer.path / name))
    options = FinetuneOptions(task=PROBE, test=test, shots=shots, recipe="linear_paper", settings=settings)
    run = finetune(outer.path, data, options, out=place, console=console)
    if not run.finished:
        raise ConfigError(
            f"the probe was stopped; finish it with `unmask resume {run.path}`, which stores the result in that run"
        )

    def stored() -> ProbeResult:
        result = _result(run, checkpoint.newest_step(outer), shots)
        outer.write(f"evals/probe-{run.path.name}.json", to_json(result))
        return result

    return current().from_writer(stored)


def _result(run: Run, step: int | None, shots: int | None) -> ProbeResult:
    """Return the score of the trained head as a probe result. step: step of the probed checkpoint."""
    found, plan = read_score(run), read_plan(run)
    assert found is not None, "a finished run has a test result"
    row = FeatureScore(
        features=PRETRAINED, pool="cls", value=found.value, low=found.low, high=found.high, total=found.test_images,
        correct=found.correct,
    )  # fmt: skip
    return ProbeResult(
        kind="paper-linear",
        title="Linear probe by the paper's protocol",
        data=found.data,
        test=found.test,
        step=step,
        names=found.classes,
        train_images=found.train_images,
        test_images=found.test_images,
        chance=1 / len(found.classes),
        interval="Wilson interval over the test images",
        rows=(row,),
        shots=shots,
        run=run.path.name,
        best=found.best,
        protocol=(
            "Class token, BatchNorm without gain, one linear layer; LARS on augmented images (He et al. 2021, Table "
            f"10), {plan.epochs:.4g} epochs ({plan.steps} steps) of batch {plan.batch_size} at a peak rate of "
            f"{plan.peak_lr:.3g}."
        ),
        verdict="This probe has no controls: to see whether pre-training helped, use --kind linear --controls.",
    )
