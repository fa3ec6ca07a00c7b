"""`Method.after_step` is called once per optimiser step, and changes nothing after a skipped step."""

import pytest
import torch
from conftest import pretrain

from unmask.engine import train as loop
from unmask.methods.mae import MAE
from unmask.nn.ema import moved

TINY = [
    "data.size=16", "method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2",
    "method.encoder.patch=4", "method.decoder.width=16", "method.decoder.depth=1", "method.decoder.heads=1",
    "train.batch_size=8", "train.micro_batch=4", "train.steps=4", "data.workers=0", "train.picture_every=100",
]  # fmt: skip


@pytest.fixture
def followed(monkeypatch):
    """Calls of `after_step` as (step, micro-batch, counted, moving average of the class token)."""
    seen = []

    def after_step(self, clock):
        token = self.encoder.cls_token.detach()
        teacher = seen[-1][3] if seen else token.clone()
        seen.append((clock.step, clock.micro, bool(clock.counted), moved(teacher, token, 0.5, clock.counted)))

    monkeypatch.setattr(MAE, "after_step", after_step)
    return seen


def test_after_step_is_called_once_per_step_for_any_accumulation(tmp_path, followed):
    pretrain("shapes:32", recipe="mae_nano", out=tmp_path / "run", settings=TINY)
    assert [each[:3] for each in followed] == [(0, 1, True), (1, 1, True), (2, 1, True), (3, 1, True)]
    assert not torch.equal(followed[1][3], followed[3][3]), "the token is trained, so its moving average changes"


def test_after_step_changes_nothing_after_a_skipped_step(tmp_path, followed, monkeypatch):
    real = loop.update

    def with_one_bad_loss(optimizer, lr, loss, clip):
        if len(followed) == 2:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.full_like(parameter, float("nan"))
        return real(optimizer, lr, loss, clip)

    monkeypatch.setattr(loop, "update", with_one_bad_loss)
    run = pretrain("shapes:32", recipe="mae_nano", out=tmp_path / "run", settings=TINY)
    assert [each[2] for each in followed] == [True, True, False, True]
    assert torch.equal(followed[1][3], followed[2][3])
    assert not torch.equal(followed[2][3], followed[3][3])
    assert [row["step"] for row in run.metrics() if "skipped" in row] == [3]
