"""Features of images: their order, precision, digests and errors."""

import numpy as np
import pytest
import torch
from feature_tables import over
from torch import nn

from unmask.batch import Batch, ImageSpec
from unmask.evals.frozen_features import LARGEST_PIXEL_SIDE, RawPixels, collect_each
from unmask.nn.features import Features
from unmask.nn.vit import ViT, ViTConfig

COUNT = 23


def vit(size=(8, 12), channels=3, dtype="uint8"):
    torch.manual_seed(0)
    spec = ImageSpec(channels, size, dtype, (100.0,) * channels, (50.0,) * channels)
    return ViT(ViTConfig(width=16, depth=2, heads=2, patch=(4, 4)), spec)


def pixels(count=COUNT, size=(8, 12), channels=3):
    return torch.randint(
        0, 256, (count, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def collect(encoder, batches, precision="fp32"):
    return collect_each({"x": encoder}, over(batches), device="cpu", precision=precision)["x"]


def batches(images, size, labels=True, first=100):
    for i in range(0, len(images), size):
        part = images[i : i + size]
        index = torch.arange(first + i, first + i + len(part))
        yield Batch(part, index, torch.zeros_like(index), index % 3 if labels else None)


def table(encoder, images, size=8, **more):
    return collect(encoder, batches(images, size, **more))


def test_rows_are_class_tokens_and_means_of_patch_tokens_in_order():
    encoder, images = vit(), pixels()
    found = table(encoder, images)
    with torch.no_grad():
        want = encoder.eval()(images)
    np.testing.assert_allclose(found.cls, want.cls.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.mean, want.patches.mean(1).numpy(), atol=1e-5)
    assert found.cls.dtype == found.mean.dtype == np.float32
    assert found.index.tolist() == list(range(100, 100 + COUNT))
    assert found.labels.tolist() == [row % 3 for row in found.index]
    assert len(found) == COUNT


def test_features_are_reproducible_and_independent_of_the_batch_size():
    encoder, images = vit(), pixels()
    first = table(encoder, images)
    again = table(encoder, images)
    for name in ("cls", "mean", "digest", "index", "labels"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name
    for size in (1, 7, COUNT):
        other = table(encoder, images, size)
        np.testing.assert_allclose(other.cls, first.cls, atol=2e-6)
        np.testing.assert_allclose(other.mean, first.mean, atol=2e-6)
        np.testing.assert_array_equal(other.digest, first.digest)


class Strange(nn.Module):
    """An encoder without class token that records its calls; one of its modules is always in eval mode."""

    def __init__(self):
        super().__init__()
        self.live, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)
        self.frozen.eval()
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return Features(None, self.live(images.float().flatten(2).transpose(1, 2)), images.shape[2:])


def test_the_encoder_runs_in_eval_mode_without_gradients_and_its_mode_is_restored():
    encoder = Strange().train()
    encoder.frozen.eval()
    found = table(encoder, pixels(), labels=False)
    assert set(encoder.seen) == {(False, False, False)}
    assert encoder.training
    assert encoder.live.training
    assert not encoder.frozen.training
    assert found.cls is None
    assert found.labels is None
    collect(encoder, batches(pixels(), 8), precision="bf16")
    assert encoder.seen[-1] == (False, False, True)


def test_the_mode_of_the_encoder_is_also_restored_after_an_error():
    class Failing(Strange):
        def forward(self, images):
            raise RuntimeError("no")

    encoder = Failing().train()
    with pytest.raises(RuntimeError, match="no"):
        table(encoder, pixels())
    assert encoder.live.training


def test_bf16_features_are_returned_as_float32():
    found = collect(vit(), batches(pixels(), 8), precision="bf16")
    exact = table(vit(), pixels())
    assert found.mean.dtype == np.float32
    assert 0 < np.abs(found.mean - exact.mean).max() < 0.1


def test_several_encoders_read_the_images_once():
    reads = []

    def counted():
        for batch in batches(pixels(), 8):
            reads.append(len(batch))
            yield batch

    found = collect_each({"a": vit(), "b": RawPixels()}, over(counted()), device="cpu", precision="fp32")
    assert sum(reads) == COUNT
    np.testing.assert_array_equal(found["a"].cls, table(vit(), pixels()).cls)
    np.testing.assert_array_equal(found["b"].mean, pixels().float().flatten(1).numpy())
    np.testing.assert_array_equal(found["a"].index, found["b"].index)


def test_raw_pixels_of_large_images_are_averaged_down():
    images = pixels(2, (8, 12), 5)
    features = RawPixels()(images)
    assert features.cls is None
    assert features.patches.shape == (2, 1, 5 * 8 * 12)
    large = torch.arange(64 * 96, dtype=torch.float32).reshape(1, 1, 64, 96)
    shrunk = RawPixels()(large).patches.reshape(21, LARGEST_PIXEL_SIDE)
    assert float(shrunk.mean()) == pytest.approx(float(large.mean()), rel=0.01)
    wide = RawPixels()(torch.zeros(1, 1, 1, 200)).patches
    assert wide.shape == (1, 1, 32)  # the shorter side is rounded up to one pixel
    square = torch.arange(64 * 64, dtype=torch.float32).reshape(1, 1, 64, 64)
    cells = RawPixels()(square).patches.reshape(32, 32)
    assert cells[0, 0] == square[0, 0, :2, :2].mean()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_only_identical_images_have_equal_digests(dtype):
    images = pixels(4)
    images[2] = images[0]
    images[3, 0, 0, 0] ^= 1
    images = images.to(dtype)
    digest = table(RawPixels(), images).digest
    assert digest.dtype == np.uint64
    assert digest[0] == digest[2]
    assert len(set(digest.tolist())) == 3
    assert digest[3] != table(RawPixels(), pixels(4).to(dtype)).digest[3], "a single different pixel changes the digest"


def test_features_that_are_not_finite_are_rejected_with_their_row():
    class Broken(nn.Module):
        def forward(self, images):
            out = images.float().flatten(1)[:, None]
            out[3] = float("nan")
            return Features(None, out, (1, 1))

    with pytest.raises(
        ValueError, match=r"1 of 8 images are not finite \(the first is row 103 of the source\).*--step"
    ):
        table(Broken(), pixels())


def test_an_empty_set_of_images_is_rejected():
    with pytest.raises(ValueError, match="got no images"):
        table(vit(), pixels(0))


def test_labels_are_none_if_any_batch_has_no_labels():
    mixed = [*batches(pixels(4), 4), *batches(pixels(4), 4, labels=False)]
    assert collect(RawPixels(), mixed).labels is None
