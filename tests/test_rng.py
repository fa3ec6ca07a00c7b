"""Counter-based random numbers match published values, do not depend on position, and are equal in NumPy and torch."""

import numpy as np
import pytest
import torch

from unmask.rng import Draws, Stream, permutation, philox, uniform, words

GOLDEN_ORDER = [4, 2, 0, 5, 1, 7, 6, 3]
GOLDEN_UNIFORM = [0.9178564548492432, 0.3271598815917969, 0.08104187250137329]


def test_philox_gives_the_published_known_answers():
    # From the file kat_vectors of the library Random123: philox 4x32 with 10 rounds.
    zero, full = np.zeros(1, np.int64), np.full(1, 0xFFFFFFFF, np.int64)
    assert [int(w[0]) for w in philox((zero,) * 4, (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w[0]) for w in philox((full,) * 4, (0xFFFFFFFF, 0xFFFFFFFF))] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]
    pi = [np.full(1, w, np.int64) for w in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    assert [int(w[0]) for w in philox(tuple(pi), (0xA4093822, 0x299F31D0))] == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_numpy_and_torch_draw_the_same():
    index, epoch = np.arange(100), np.arange(100) % 7
    ours = uniform(5, Stream.MASK, epoch, index, 13)
    theirs = uniform(5, Stream.MASK, torch.from_numpy(epoch), torch.from_numpy(index), 13)
    assert ours.dtype == np.float32
    assert (ours == theirs.numpy()).all()
    assert 0 <= ours.min() < ours.max() < 1


def test_draw_does_not_depend_on_the_position_in_the_batch():
    whole = uniform(1, Stream.CROP, np.zeros(10, np.int64), np.arange(10), 5)
    shuffled = np.array([7, 3, 9])
    assert (uniform(1, Stream.CROP, np.zeros(3, np.int64), shuffled, 5) == whole[shuffled]).all()
    # the first numbers do not depend on how many are drawn
    assert (uniform(1, Stream.CROP, np.zeros(10, np.int64), np.arange(10), 50)[:, :5] == whole).all()


@pytest.mark.parametrize("change", ["seed", "stream", "epoch", "index"])
def test_each_input_changes_the_draw_and_inputs_are_never_added(change):
    def draw(seed=1, stream=Stream.MASK, epoch=1, index=1):
        return words(seed, stream, np.array([epoch]), np.array([index]), 8)[0].tolist()

    assert draw(**{change: 2 if change != "stream" else Stream.CROP}) != draw()
    # seed 2, epoch 1 must differ from seed 1, epoch 2, unlike with generators seeded by seed + epoch
    all_draws = [tuple(draw(s, Stream.MASK, e, i)) for s in range(3) for e in range(3) for i in range(3)]
    assert len(set(all_draws)) == 27


def test_permutation_contains_every_image_once_and_differs_between_epochs():
    first, second = permutation(3, 0, 1000), permutation(3, 1, 1000)
    assert sorted(first) == list(range(1000)) == sorted(second)
    assert (first != second).any()
    assert (first == permutation(3, 0, 1000)).all()


def test_golden_values_keep_old_runs_resumable():
    assert permutation(0, 0, 8).tolist() == GOLDEN_ORDER
    got = uniform(0, Stream.MASK, np.array([2]), np.array([5]), 3)[0]
    assert got.tolist() == pytest.approx(GOLDEN_UNIFORM, abs=0)


def test_draws_are_uniform():
    values = uniform(0, Stream.MASK, np.zeros(2000, np.int64), np.arange(2000), 50)
    counts = np.histogram(values, 20, (0, 1))[0]
    assert abs(counts / counts.mean() - 1).max() < 0.06
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.08


def test_uniform_draws_have_a_row_per_image():
    draws = Draws(9, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert draws.uniform(6).shape == (4, 6)
