"""Principal components of patches as a target, compared with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from unmask.errors import UserError
from unmask.nn.masks import mask_from_noise
from unmask.nn.patches import take
from unmask.nn.targets import PrincipalComponents

GRID = (4, 4)


def correlated_patches(count: int = 400) -> torch.Tensor:
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(12, 12)) * np.geomspace(1, 0.01, 12)[:, None]
    return torch.from_numpy((generator.normal(size=(1, count, 12)) @ mix + 3).astype(np.float32))


@pytest.mark.parametrize("whiten", [False, True])
def test_coefficients_are_those_of_scikit_learn_up_to_sign(whiten):
    patches = correlated_patches()
    target = PrincipalComponents(12, GRID, 3, count=5, whiten=whiten)
    target.prepare(patches)
    theirs = PCA(5, whiten=whiten, svd_solver="full").fit(patches[0].numpy())
    ours, expected = target(patches, patches)[0].numpy(), theirs.transform(patches[0].numpy())
    assert np.abs(ours) == pytest.approx(np.abs(expected), rel=1e-3, abs=2e-3)
    strongest = target.basis.gather(0, target.basis.abs().argmax(0, keepdim=True))
    assert (strongest > 0).all(), "the sign does not depend on the library"


def test_drawing_the_true_coefficients_reconstructs_their_subspace():
    patches = correlated_patches(16).expand(2, -1, -1)
    mask = mask_from_noise(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    for count, close in ((12, 1e-4), (2, 2.0)):
        target = PrincipalComponents(12, GRID, 3, count=count, whiten=True)
        target.prepare(patches[:1])
        truth = take(target(patches, patches), mask.drop)
        drawn = target.draw(truth, patches, patches, mask)["pasted"]
        error = (drawn - take(patches, mask.drop)).abs().max()
        assert error < close
    assert error > 1e-3, "two components do not reconstruct the patch"


def test_an_unprepared_target_is_finite_and_zero():
    target = PrincipalComponents(12, GRID, 3, count=5, whiten=False)
    assert target(torch.ones(2, 16, 12), torch.ones(2)).eq(0).all()


def test_more_components_than_values_are_rejected():
    with pytest.raises(
        UserError, match=r"got method.pca_coefficients=96; a patch has only 48 values; use at most 48 \(the paper"
    ):
        PrincipalComponents(48, GRID, 3, count=96, whiten=False)
