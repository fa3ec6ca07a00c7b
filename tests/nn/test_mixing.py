"""Mixup and cutmix: images and targets are mixed with the same ratio, and nothing is mixed if alpha is 0."""

import numpy as np
import pytest
import torch

from unmask.nn.mixing import beta_quantile, cut_box, mix, soft_targets

LABELS = torch.tensor([0, 1, 2, 2])
IMAGES = torch.arange(4).reshape(4, 1, 1, 1).expand(4, 2, 8, 12).to(torch.uint8) * 50


def test_soft_targets_are_distributions():
    found = soft_targets(LABELS, 5, 0.1)
    assert found.sum(1) == pytest.approx(torch.ones(4))
    assert found[0, 0] == pytest.approx(0.92)
    assert found[0, 1] == pytest.approx(0.02)


def test_nothing_is_mixed_without_alpha():
    targets = soft_targets(LABELS, 3, 0.0)
    images, after = mix(IMAGES, targets, np.full(4, 0.3), mixup=0.0, cutmix=0.0)
    assert images is IMAGES
    assert after is targets


@pytest.mark.parametrize("draws", np.random.default_rng(0).random((12, 4)))
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_match_the_share_of_each_image(draws, mixup, cutmix):
    images, targets = mix(IMAGES, soft_targets(torch.arange(4), 4, 0.0), draws, mixup=mixup, cutmix=cutmix)
    seen = images.float().mean((1, 2, 3)) / 50  # weighted mean of the indices of the mixed images
    assert seen.tolist() == pytest.approx((targets * torch.arange(4)).sum(1).tolist(), abs=1e-4)
    assert targets.sum(1).tolist() == pytest.approx([1] * 4)


def test_mixup_and_cutmix_both_occur_and_cutmix_keeps_the_dtype():
    kinds = {
        mix(IMAGES, soft_targets(LABELS, 3, 0.0), np.array([toss, 0.3, 0.5, 0.5]), mixup=0.8, cutmix=1.0)[0].dtype
        for toss in (0.2, 0.8)
    }
    assert kinds == {torch.uint8, torch.float32}


def test_beta_distribution_matches_scipy():
    from scipy.stats import beta, kstest

    draws = [beta_quantile(u, 0.8) for u in np.random.default_rng(0).random(2000)]
    assert kstest(draws, beta(0.8, 0.8).cdf).pvalue > 0.01


def test_cut_box_has_the_images_aspect_ratio_and_stays_inside():
    rows, cols = cut_box((80, 120), 0.75, 0.5, 0.5)
    assert (rows.stop - rows.start, cols.stop - cols.start) == (40, 60)
    rows, cols = cut_box((80, 120), 0.75, 0.0, 0.999)
    assert rows == slice(0, 20)
    assert (cols.start, cols.stop) == (89, 120)
