"""Absent pixels do not count in the loss of any method, and a batch without absent pixels has the same loss as a batch
without `valid`.
"""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from conftest import SMALL_RUN, pretrain
from test_contract import METHODS, batch_for, clock, make, shrunk, warm

from unmask.batch import Batch
from unmask.config import override
from unmask.engine.continue_run import resume
from unmask.method import Method
from unmask.nn.losses import weighted_mean
from unmask.nn.patches import patchify
from unmask.nn.targets import PrincipalComponents, Tokens, patch_statistics
from unmask.nn.valid import valid_patches
from unmask.recipes.catalogue import find
from unmask.report.pictures import compose

VARIANTS = [
    *METHODS,
    "mae method.target=pixels",
    "mae method.target=pca",
    "mae method.loss_on=all",
    "mpp method.target=pixels",
    "mpp method.target=colours_4x4",
    "igpt method.objective=bert",
    "beit method.target=pixels",
    "dae method.corruption=gaussian",
    "ae method.encoder.loss=bce",
]


@pytest.fixture(params=VARIANTS)
def method(request) -> Method:
    """Return a method after a few steps, or an untrained variant of it."""
    name, *settings = request.param.split()
    if not settings:
        return warm(name)
    torch.manual_seed(0)
    made = override(find(f"{name}_nano"), [*shrunk(name)[1], *settings]).build(make(name).encoder.spec)
    if made.num_prepare:
        made.prepare(batch_for(made, 16).images)
    return made


def with_holes(method: Method, left: int = 8) -> Batch:
    """Return images whose right part is absent and filled with the data's mean."""
    batch = batch_for(method)
    valid = torch.ones(4, 16, 16, dtype=torch.bool)
    valid[:, :, left:] = False
    mean = torch.tensor(method.encoder.spec.mean).round().to(batch.images.dtype)[:, None, None]
    return replace(batch, images=torch.where(valid[:, None], batch.images, mean), valid=valid)


def loss(method: Method, batch: Batch) -> float:
    with torch.no_grad():
        return float(method(batch, clock(batch)).value)


def test_a_fully_valid_batch_has_the_loss_of_a_batch_without_a_mask(method):
    batch = batch_for(method)
    everywhere = replace(batch, valid=torch.ones(4, 16, 16, dtype=torch.bool))
    assert loss(method, everywhere) == pytest.approx(loss(method, batch), rel=1e-5)


def test_absent_pixels_change_the_loss_and_its_gradient_stays_finite(method):
    batch = with_holes(method)
    value = method(batch, clock(batch)).value
    assert value.isfinite()
    if method.__class__.__name__ != "IGPT" or method.causal:  # iGPT-BERT's head starts at zero: the loss is the same
        assert float(value.detach()) != pytest.approx(loss(method, replace(batch, valid=None)), rel=1e-6)
    value.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_a_batch_without_any_valid_pixel_has_loss_zero(method):
    batch = with_holes(method, left=0)
    found = method(batch, clock(batch))
    assert float(found.value.detach()) == 0
    assert found.value.requires_grad
    assert all(log.isfinite() for log in found.logs.values())
    found.value.backward()
    assert all((p.grad == 0).all() for p in method.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in method.parameters())


def test_the_loss_ignores_absent_pixels(method):
    """Different targets in absent pixels do not change the loss, but would change it without `valid`."""
    if not hasattr(method, "target"):
        return  # the gradient test covers methods without targets
    target = method.target
    by_value = not isinstance(target, Tokens | PrincipalComponents)
    batch = with_holes(method, 6 if by_value else 8)  # the edge is inside a patch or between patches
    kept, full = loss(method, batch), loss(method, replace(batch, valid=None))
    if isinstance(target, Tokens):
        ids = target.forward

        def other(patches, images, valid=None):
            truth = ids(patches, images)
            return torch.where(valid_patches(batch, (4, 4)).patches[..., None], truth, (truth + 1) % target.out)

        target.forward = other
    else:
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, batch.images.shape, np.uint8))
        changed = torch.where(batch.valid[:, None], batch.images, noise)
        if isinstance(target, torch.nn.Module):
            patches, real = method.encoder.patches(changed), target.forward
            target.forward = lambda _, images, valid=None: real(patches, changed, valid)
        else:
            method.target = lambda images, valid=None: target(changed, valid)
    assert loss(method, batch) == pytest.approx(kept, rel=1e-5)
    assert loss(method, replace(batch, valid=None)) != pytest.approx(full, rel=1e-4)


def test_absent_pixels_have_no_gradient_to_the_decoder(method):
    """In methods that decode whole images, absent pixels have no gradient."""
    if not hasattr(method, "decoder") or hasattr(method, "target"):
        return
    batch, seen = with_holes(method), []
    handle = method.decoder.register_forward_hook(lambda _, given, made: seen.append(made) or made.retain_grad())
    method(batch, clock(batch)).value.backward()
    handle.remove()
    gradient = seen[0].grad.abs().sum(1)
    assert (gradient[~batch.valid] == 0).all()
    assert gradient[batch.valid].mean() > 0


def test_pictures_are_finite_and_mark_absent_pixels(method):
    batch = with_holes(method)
    with torch.no_grad():
        picture = method.eval().picture(batch, clock(batch))._replace(valid=batch.valid)
    assert all(panel.isfinite().all() for panel in picture.panels.values())
    assert all(torch.as_tensor(number).isfinite() for number in picture.numbers.values())
    sheet = np.asarray(compose(picture.sampled(2), "uint8", "title"))
    plain = np.asarray(compose(picture._replace(valid=None).sampled(2), "uint8", "title"))
    boards = (sheet == 200).all(-1) | (sheet == 235).all(-1)
    assert boards.mean() > 0.05
    assert boards.mean() > ((plain == 200).all(-1) | (plain == 235).all(-1)).mean() + 0.05


def test_patches_with_enough_valid_pixels_have_weight_one():
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[0, :4, :2] = False  # Half of the first patch is absent.
    valid[0, 4:, :3] = False  # Three quarters of the third patch are absent.
    batch = Batch(torch.zeros(1, 2, 8, 8), torch.zeros(1), torch.zeros(1), valid=valid)
    found = valid_patches(batch, (4, 4))
    assert found.patches.tolist() == [[True, True, False, True]]
    assert found.values.shape == (1, 4, 32)
    assert found.values.sum(2).tolist() == [[16, 32, 0, 32]]
    assert torch.equal(found.values[0, 0], patchify(valid[:, None].expand(1, 2, 8, 8).float(), (4, 4))[0, 0])
    strict = valid_patches(replace(batch, min_valid=0.6), (4, 4))
    assert strict.patches.tolist() == [[False, True, False, True]]
    assert valid_patches(replace(batch, valid=None), (4, 4)) is None


def test_patch_statistics_use_valid_values_only():
    values = torch.tensor([[[1.0, 2.0, 4.0, 99.0]]])
    batch = Batch(
        torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.zeros(1), valid=torch.tensor([[[True, True], [True, False]]])
    )
    found = patch_statistics(values, valid_patches(batch, (2, 2)))
    known = patch_statistics(values[..., :3])
    assert torch.allclose(found.mean, known.mean)
    assert torch.allclose(found.std, known.std)
    nothing = patch_statistics(values, valid_patches(replace(batch, min_valid=0.9), (2, 2)))
    assert torch.equal(nothing.remove(values), values), "patches without valid values are not normalised"


def test_a_weighted_mean_ignores_values_of_weight_zero_and_is_zero_if_all_weights_are():
    values = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    assert float(weighted_mean(values).detach()) == 2.75
    assert float(weighted_mean(values, torch.tensor([[1.0], [0.0]])).detach()) == 1.5
    nothing = weighted_mean(values, torch.zeros(2, 2))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert (values.grad == 0).all()


def test_training_on_terrain_with_holes_is_finite_and_resumes_exactly(tmp_path):
    folder = tmp_path / "terrain"
    folder.mkdir()
    for number in range(16):
        heights = np.random.default_rng(number).normal(250, 60, (24, 24)).astype(np.float32)
        heights[: 12 * (number % 3), 4:] = -9999
        tifffile.imwrite(folder / f"{number:02}.tif", heights, extratags=[(42113, "s", 0, "-9999", True)])
    settings = [*SMALL_RUN, "train.steps=4", "train.checkpoint_every=2"]
    run = pretrain(folder, recipe="mae_nano", out=tmp_path / "run", settings=settings)
    plan = run.read("plan.json")
    assert plan["images"]["mean"] == pytest.approx([250], abs=3)
    assert plan["images"]["std"] == pytest.approx([60], abs=3)
    assert any("absent pixels" in reason for reason in plan["reasons"])
    losses = [row["loss"] for row in run.metrics() if "loss" in row]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert max(losses) < 3
    other = pretrain(folder, recipe="mae_nano", out=tmp_path / "again", settings=[*settings, "data.min_valid=1"])
    assert [row["loss"] for row in other.metrics() if "loss" in row] != losses
    assert resume(run.path).path == run.path
