"""Check that the private kernels of torch used by `data/antialias.py` still work, and so do the fallbacks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unmask.data import antialias
from unmask.data.augment import cut

CHANGED = "torch {} changed torch.ops.aten.{}: adapt data/antialias.py, or leave it to the fallback"
KERNELS = {"bicubic": "_upsample_bicubic2d_aa", "bilinear": "_upsample_bilinear2d_aa"}
BOXES = [(4.0, 6.0, 50.0, 40.0), (4.5, 6.25, 50.0, 40.0), (0.0, 0.0, 20.0, 16.0)]


def changed(interpolation: str) -> str:
    return CHANGED.format(torch.__version__, KERNELS[interpolation])


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 60, 50), np.uint8))


@pytest.mark.parametrize("interpolation", KERNELS)
def test_kernels_still_resample_like_interpolate(interpolation):
    assert antialias.KERNELS[interpolation] is not None, changed(interpolation)
    wanted = F.interpolate(images(), (16, 20), mode=interpolation, antialias=True)
    out = torch.empty_like(wanted)
    antialias.resample_into(out, images(), interpolation)
    assert torch.equal(out, wanted), changed(interpolation)
    by_steps = antialias.resample_by_steps(images(), (16, 20), (60 / 16, 50 / 20), interpolation)
    assert by_steps is not None
    assert torch.equal(by_steps, wanted), changed(interpolation)


@pytest.mark.parametrize("interpolation", KERNELS)
def test_steps_are_those_between_samples(interpolation):
    whole = antialias.resample_by_steps(images(), (30, 25), (2.0, 2.0), interpolation)
    part = antialias.resample_by_steps(images(), (10, 9), (2.0, 2.0), interpolation)
    assert whole is not None
    assert part is not None
    assert torch.equal(part, whole[:, :, :10, :9]), changed(interpolation)


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize("box", BOXES)
def test_crops_without_the_private_kernels_are_nearly_the_same(interpolation, box, monkeypatch):
    image = images()[0].permute(1, 2, 0).numpy()
    wanted = cut(image, np.array(box), (20, 16), False, interpolation=interpolation)
    monkeypatch.setattr(antialias, "KERNELS", dict.fromkeys(KERNELS))
    found = cut(image, np.array(box), (20, 16), False, interpolation=interpolation)
    assert np.abs(found.astype(int) - wanted.astype(int)).mean() < 1
