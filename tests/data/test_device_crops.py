"""Resampling on the device: the crops are the same, and pixels agree with Pillow up to rounding."""

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, pretrain, write_images
from PIL import Image

from unmask.batch import Batch, ImageSpec
from unmask.config import ConfigError
from unmask.data.augment import CropConfig, cut, cut_later, part_size
from unmask.data.device_crops import resample, to_device, weights
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, training_batches
from unmask.data.order import Order
from unmask.data.sources.open_source import open_source
from unmask.engine.continue_run import resume


def picture(height: int, width: int, channels: int) -> np.ndarray:
    coarse = np.random.default_rng(channels).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return large[:, :, :channels].copy()


def later(image: np.ndarray, box: tuple[float, ...], target: tuple[int, int], flip: bool) -> np.ndarray:
    out, crop = np.full((*part_size(target), image.shape[2]), 77, np.uint8), np.empty(7, np.float32)
    cut_later(image, np.array(box), target, flip, out, crop)
    images = torch.from_numpy(out).permute(2, 0, 1)[None]
    return resample(images, torch.from_numpy(crop)[None], target)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box", [(3, 5, 50, 61), (0, 0, 120, 90), (10, 20, 9, 7), (0.25, 7.5, 60.3, 41), (88.5, 60.1, 31.5, 29.9)]
)
def test_device_crops_agree_with_the_loader_up_to_rounding(channels, flip, box):
    image = picture(120, 90, channels)
    difference = np.abs(later(image, box, (48, 40), flip).astype(int) - cut(image, np.array(box), (48, 40), flip))
    assert difference.mean() < 0.3
    # Both resample one axis, clip the result, and then resample the other axis, but in a different order of axes.
    assert difference.max() <= 8


def test_fractional_boxes_agree_with_pillow_up_to_one_level():
    image = picture(120, 90, 3)
    for top, left, height, width in ((0.25, 7.5, 60.3, 41.0), (30.1, 2.2, 80.7, 70.9), (5.5, 5.5, 20, 20)):
        shown = Image.fromarray(image).resize(
            (40, 48), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        assert np.abs(later(image, (top, left, height, width), (48, 40), False) - np.asarray(shown, int)).max() <= 1


def test_part_that_does_not_fit_is_resampled_by_the_loader():
    image = picture(400, 500, 3)
    for box in ((0, 0, 400, 500), (0.5, 0, 300, 400)):
        assert (later(image, box, (48, 40), True) == cut(image, np.array(box), (48, 40), True)).all()


def test_weights_sum_to_one_and_are_zero_for_padding():
    found = weights(torch.tensor([0.0, 3.3]), torch.tensor([10.0, 20.0]), torch.tensor([10.0, 25.0]), 7, 30)
    assert torch.allclose(found.sum(2), torch.ones(2, 7))
    assert not found[0, :, 10:].any()
    assert not found[1, :, 25:].any()


def drawn(folder, *, workers=0, on_device=True, repeats=1, batch=8, start=0) -> list[Batch]:
    source = open_source(folder)
    spec = ImageSpec(3, (16, 16), "uint8", (0.0,) * 3, (1.0,) * 3)
    images = ImageReader(source, np.arange(len(source)), spec, CropConfig(), repeats=repeats, on_device=on_device)
    stream = training_batches(images, MicroBatches(start, batch, (64 - start) // batch), workers=workers)
    return [to_device(delivery.batch, "cpu") for delivery in stream]


def test_device_crops_do_not_depend_on_workers_batches_and_start(images):
    here, there = Batch.join(drawn(images)), Batch.join(drawn(images, on_device=False))
    assert torch.equal(here.index, there.index)
    assert torch.equal(here.epoch, there.epoch)
    assert here.images.shape == there.images.shape
    assert here.images.is_contiguous(memory_format=torch.channels_last)
    assert (here.images.float() - there.images.float()).abs().mean() < 0.5
    for other in (drawn(images, workers=2), drawn(images, batch=4), drawn(images, batch=32)):
        assert torch.equal(Batch.join(other).images, here.images)
    assert torch.equal(Batch.join(drawn(images, start=24)).images, here.images[24:])


def test_device_crops_work_with_replacements_and_repeats(images):
    (images / "0003.png").write_bytes(b"")
    here, there = (Batch.join(drawn(images, on_device=way, repeats=2)) for way in (True, False))
    assert torch.equal(here.index, there.index)
    assert 3 not in here.index
    assert (here.images.float() - there.images.float()).abs().mean() < 0.5


def test_evaluation_images_are_resampled_by_the_loader(images):
    source = open_source(images)
    spec = ImageSpec(3, (16, 16), "uint8", (0.0,) * 3, (1.0,) * 3)
    data = ImageReader(source, np.arange(30), spec, CropConfig(), training=False, on_device=True)
    batch = data[Order(data.rows, 0).take(0, 4)].batch
    assert batch.crops is None
    assert batch.images.shape == (4, 3, 16, 16)
    assert to_device(batch, "cpu") is batch


def test_run_with_device_resampling_resumes_exactly(images, tmp_path, monkeypatch):
    settings = [*SMALL_RUN, "train.steps=6", "train.checkpoint_every=3", "data.resize=device"]
    whole = pretrain(images, recipe="mae_nano", out=tmp_path / "whole", settings=settings)
    assert any("resampled on the device" in reason for reason in whole.read("plan.json")["reasons"])
    true_log = type(whole).log

    def stop_at_five(self, row):
        if row.get("step") == 5:
            raise KeyboardInterrupt
        true_log(self, row)

    monkeypatch.setattr(type(whole), "log", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, recipe="mae_nano", out=tmp_path / "broken", settings=settings)
    monkeypatch.setattr(type(whole), "log", true_log)
    gone_on = resume(tmp_path / "broken")
    losses = [[(row["step"], row["loss"]) for row in run.metrics() if "loss" in row] for run in (whole, gone_on)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_images_that_the_device_cannot_resample_are_rejected(tmp_path):
    (tmp_path / "bands").mkdir()
    np.save(tmp_path / "bands" / "a.npy", np.random.default_rng(0).integers(0, 256, (20, 20, 5), np.uint8))
    for data, more, message in (
        (tmp_path / "bands", [], "uint8 images of 5 channels"),
        (write_images(tmp_path / "rgb", 8), ["data.crop.jitter=0.4"], r"data\.crop\.jitter"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(data, recipe="mae_nano", out=tmp_path / "run", settings=[*SMALL_RUN, "data.resize=device", *more])
