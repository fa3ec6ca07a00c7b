"""k-means for palettes, compared with scikit-learn, and with few distinct colours."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from unmask.nn.colour_palette import k_means, nearest_colour


def clouds(count: int = 3000) -> torch.Tensor:
    generator = np.random.default_rng(0)
    centers = generator.random((12, 3)) * 255
    return torch.from_numpy(
        (centers[generator.integers(12, size=count)] + generator.normal(size=(count, 3)) * 9).astype(np.float32)
    )


def left(pixels: torch.Tensor, colours: torch.Tensor) -> float:
    return float((pixels - colours[nearest_colour(pixels, colours)]).square().sum(1).mean())


def test_quantisation_error_is_close_to_that_of_scikit_learn():
    pixels = clouds()
    ours = left(pixels, k_means(pixels, 16))
    theirs = KMeans(16, n_init=5, random_state=0).fit(pixels.numpy()).inertia_ / len(pixels)
    assert ours < 1.15 * theirs
    assert ours < 0.2 * left(pixels, pixels[:16])


def test_the_palette_depends_on_pixels_and_seed_alone():
    pixels = clouds()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = k_means(pixels, 8)
    assert torch.equal(first, k_means(pixels, 8))
    assert not torch.equal(first, k_means(pixels, 8, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_pixels_with_fewer_colours_than_the_palette_are_reproduced_exactly():
    pixels = torch.tensor([[1.0], [5.0], [9.0]]).repeat(20, 1)
    colours = k_means(pixels, 8)
    assert colours.shape == (8, 1)
    assert left(pixels, colours) == 0
    assert set(colours.flatten().tolist()) == {1.0, 5.0, 9.0}


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_nearest_colour_is_exact_in_any_units_and_ties_go_to_the_lower_index(top):
    colours = torch.tensor([[0.5, 0.5], [0.50001, 0.5], [0.9, 0.1]]) * top
    assert nearest_colour(colours.reshape(1, 3, 2), colours).tolist() == [[0, 1, 2]]
    assert int(nearest_colour(torch.tensor([1.0]), torch.tensor([[0.0], [2.0]]))) == 0
