"""A classifier from a pre-trained Run: its last blocks and a head learn from labels, then test images are counted.

The rows of test images are kept out of the training (`plan.excluded`), and nothing is chosen on them: the number is
that of the last weights. Learning rate, betas and weight decay are those of MAE's fine-tuning (He et al. 2021, Table
9); `tasks/classify.py` says what of that recipe is not here.

So far this is what `ablate fig9` needs; a verb for people comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask import checkpoint, start
from unmask.beside import SCORE
from unmask.config import Config, ConfigError, Graft
from unmask.console import Console
from unmask.data.sources import Source, open_source, require_labels
from unmask.evals.linear import HOLD_OUT_FOR_TEST, hold_out
from unmask.evals.probe import few_shots
from unmask.evals.scores import wilson
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig
from unmask.plan import autocast, choose_device
from unmask.run import Run
from unmask.saved import load, read_config, read_plan
from unmask.tasks import classify
from unmask.use import eval_images, eval_precision, read, with_classes

RECIPE = "classify"
OPTIM = OptimConfig(base_lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=0.05)


def fine_tuning(pretrained: Config, classes: Sequence[str]) -> Config:
    """The configuration of a classifier with the encoder of `pretrained`, its images and its length, without weights.

    Raises ConfigError for an encoder that is no plain vision transformer.
    """
    settings: Any = pretrained.method
    encoder = getattr(settings, "encoder", None)
    if not isinstance(encoder, ViTConfig):
        raise ConfigError(
            f"the encoder of {pretrained.method.name} came, and only a vision transformer's last blocks can be "
            "fine-tuned; choose a run or a recipe that has one, such as mae_nano"
        )
    return Config(
        recipe=RECIPE,
        method=classify.Config(encoder=encoder, classes=tuple(classes)),
        data=pretrained.data,
        optim=OPTIM,
        train=pretrained.train,
    )


def from_weights(run: Run, classes: Sequence[str]) -> Config:
    """`fine_tuning` of what a Run holds: its newest weights, and the size and normalisation that they know."""
    step, _ = checkpoint.load_model(run)
    config, spec = fine_tuning(read_config(run), classes), read_plan(run).images
    data = {"size": spec.size, "channels": spec.channels, "mean": spec.mean, "std": spec.std}
    taken = Graft(run=str(run.path.absolute()), source="encoder.", target="encoder.", step=step)
    return config.model_copy(update={"data": config.data.model_copy(update=data), "graft": (taken,)})


def split(source: Source, test: str | None, shots: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows) of a labelled source: a fifth is held out where there are no other test images.

    The same fifth, and the same `shots` labels per class, as in a probe with seed 0.
    """
    assert source.labels is not None, "require_labels came first"
    rows, held = np.arange(len(source)), np.zeros(0, np.int64)
    if test is None:
        rows, held = hold_out(source.labels, rows, 0, HOLD_OUT_FOR_TEST)
    if shots is not None:
        rows = few_shots(rows, source.labels[rows], source.classes, shots, 0)
    return rows, held


def fine_tune(
    from_run: str | Path,
    data: str,
    *,
    out: str | Path,
    test: str | None = None,
    shots: int | None = None,
    settings: Sequence[str] = (),
    console: Console | None = None,
) -> Run:
    """Train a classifier on the labels of `data` from the encoder of `from_run`; its Run says how it ended.

    test: other images that will be counted; None holds a fifth of `data` out. shots: labels per class, None for all.
    settings: KEY=VALUE, `method.last_blocks` among them. Stopped, it goes on with `start.resume`. Raises ValueError for
    what a person can mend.
    """
    console = console or Console(quiet=True)
    source = require_labels(open_source(data))
    config = start.resolve(from_weights(Run.open(from_run), source.classes), list(settings), source=source)
    device = choose_device(config.train.device)
    Run.check_free(out)
    rows, _ = split(source, test, shots)
    return start.start_run(
        source,
        start.scan_all(source, config, console),
        config,
        device,
        out=out,
        budget=None,
        reasons=(f"weights of {from_run}", f"labels of {len(rows)} images of {len(source.classes)} classes"),
        console=console,
        held_out=np.setdiff1d(np.arange(len(source)), rows),
    )


def score(
    run: Run, data: str, *, test: str | None, shots: int | None, console: Console | None = None
) -> dict[str, Any]:
    """Count on the test images how often the last weights are right; kept in `SCORE`, with a 95 % Wilson interval."""
    loaded = load(run.path, device=choose_device(read_plan(run).device))
    method = loaded.method
    assert isinstance(method, classify.Classifier), "fine_tune made this run"
    source = require_labels(open_source(data))
    _, rows = split(source, test, shots)
    if test is not None:
        source = with_classes(require_labels(open_source(test)), source.classes, data)
        rows = np.arange(len(source))
    correct = total = 0
    with torch.inference_mode(), autocast(eval_precision(loaded), loaded.device):
        for batch in read(eval_images(loaded, source), rows, 0, console or Console(quiet=True)):
            labels = classify.require_labels(batch).to(loaded.device)
            correct += int((method.logits(batch.images.to(loaded.device)).argmax(1) == labels).sum())
            total += len(batch)
    low, high = wilson(correct, total)
    found = {
        "accuracy": correct / total, "low": low, "high": high, "correct": correct, "total": total, "step": loaded.step,
        "data": data, "test": test or f"a held-out fifth of {data}", "shots": shots,
    }  # fmt: skip
    run.write(SCORE, found)
    return found
