"""The loss of every method over ten steps, in float32 on the CPU, compared with committed numbers.

A refactoring must not change the committed losses. Each nano recipe is made smaller and trained with its own optimiser
settings on generated tensors, without files or a data loader. After an intended change of the mathematics, update the
numbers and commit them with the change:

    python tests/methods/test_golden_curves.py [RECIPE ...]
"""

import json
import math
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.config import Config, keys, method_names, override, task_names
from unmask.method import Clock, Method
from unmask.optim import learning_rate, make_optimizer, peak_lr, update
from unmask.recipes.catalogue import all_recipes, find
from unmask.rng import Draws, Stream, uniform

CURVES = Path(__file__).with_name("golden_curves.json")
STEPS, COUNT, SIDE = 10, 8, 16
PEAK = 1e-2  # Minimum learning rate, so that ten steps change every part of the loss.
TOLERANCE = 1e-4  # Relative tolerance; rounding differs by about 1e-6 between processors and torch versions.

SMALL = {
    "width": "32", "depth": "2", "heads": "2", "patch": "[4,4]", "colours": "16", "hidden": "[64,32]", "code": "16",
    "codes": "32",
}  # fmt: skip
SPECIAL = {
    "igpt_nano": ("method.encoder.patch=[2,2]",),
    "igpt_bert_nano": ("method.encoder.patch=[2,2]",),
    "finetune_nano": ("method.head_std=0.02",),  # with head_std=2e-5 the encoder hardly affects the first losses
    "beit_nano": ('method.tokenizer={"codes":32,"width":16,"depth":1,"patch":[4,4]}',),
}
"""Settings that apply to one recipe only."""
RECIPES = [*(name for name in all_recipes() if name.endswith("_nano")), "linear_paper"]


def shrunk(recipe: str) -> Config:
    config = find(recipe)
    small = [f"{key}={SMALL[key.split('.')[-1]]}" for key in keys(config) if key.split(".")[-1] in SMALL]
    return override(config, [*small, f"data.size=[{SIDE},{SIDE}]", *SPECIAL.get(recipe, ())])


def drawn() -> Batch:
    """Return smooth images, each with a class, a segmentation mask and a box, the same on every machine."""
    rows, zero = torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.int64)
    coarse = uniform(0, Stream.SHAPES_NOISE, zero, rows, 3 * 4 * 4).reshape(COUNT, 3, 4, 4)
    noise = uniform(1, Stream.SHAPES_NOISE, zero, rows, 3 * SIDE * SIDE).reshape(COUNT, 3, SIDE, SIDE)
    blocks = coarse.repeat_interleave(SIDE // 4, 2).repeat_interleave(SIDE // 4, 3)
    images = ((0.8 * blocks + 0.2 * noise) * 255).to(torch.uint8)
    left = 4.0 * (rows % 3)
    boxes = torch.stack([left, left / 2, left + 6, left / 2 + 8], 1)[:, None]
    return Batch(
        images, rows, zero, labels=rows % 2, maps=(blocks[:, 0] > 0.5).long(), boxes=boxes,
        box_labels=(rows % 2)[:, None],
    )  # fmt: skip


@torch.no_grad()
def clipped_normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Replace torch's truncated normal, whose numbers differ between torch 2.11 and 2.13."""
    return tensor.normal_(mean, std).clamp_(a, b)


def curve(recipe: str) -> list[float]:
    """Return the loss of each of the first steps, half of which are warm-up."""
    config, batch = shrunk(recipe), drawn()
    torch.manual_seed(0)
    with patch.object(nn.init, "trunc_normal_", clipped_normal):
        method: Method = config.build(ImageSpec(3, (SIDE, SIDE), "uint8", (127.5,) * 3, (63.75,) * 3))
    if method.num_prepare:
        method.prepare(batch.images)
    optimizer, losses = make_optimizer(method, config.optim), []
    peak = max(PEAK, peak_lr(config.optim, config.train.batch_size))
    for step in range(STEPS):
        loss = method(batch, Clock(step, STEPS, Draws(0, batch.epoch, batch.index))).value
        loss.backward()
        update(optimizer, learning_rate(step, steps=STEPS, warmup_steps=5, peak=peak), loss.detach(), config.optim.clip)
        losses.append(float(loss.detach()))
    return losses


def test_every_method_and_task_has_a_curve():
    covered = {find(recipe).method.name for recipe in RECIPES}
    missing = {*method_names(), *task_names()} - covered
    assert not missing, f"no recipe in RECIPES trains {', '.join(sorted(missing))}: add one named METHOD_nano"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_follows_the_committed_curve(recipe):
    golden = json.loads(CURVES.read_text())
    assert recipe in golden, (
        f"{CURVES.name} has no curve of {recipe}; record it with `python tests/methods/{Path(__file__).name} "
        f"{recipe}` and commit it"
    )
    assert curve(recipe) == pytest.approx(golden[recipe], rel=TOLERANCE)


def test_committed_losses_are_finite_and_change():
    golden = json.loads(CURVES.read_text())
    assert not {*golden} - {*RECIPES}, "a recipe was removed or renamed: remove or rename its curve"
    for recipe, losses in golden.items():
        assert len(losses) == STEPS
        assert all(map(math.isfinite, losses))
        assert len({round(loss, 5) for loss in losses[1:]}) == STEPS - 1, f"the loss of {recipe} does not change"


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = json.loads(CURVES.read_text())
    asked = {recipe: [float(f"{loss:.7g}") for loss in curve(recipe)] for recipe in sys.argv[1:] or RECIPES}
    written = dict(sorted((before | asked).items()))
    lines = ",\n".join(f"  {json.dumps(recipe)}: {json.dumps(losses)}" for recipe, losses in written.items())
    CURVES.write_text(f"{{\n{lines}\n}}\n")
    sys.stdout.write(f"{CURVES}: {len(written)} curves\n")
