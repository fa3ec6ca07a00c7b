"""The two small recipes of `unmask demo`. For other data start with `mae_nano`."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import mae
from unmask.nn.decoders import DecoderConfig
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig


def demo_shapes() -> Config:
    """The drawn set `shapes`, 24 pixels: 96 x 4 encoder, patch 4, plain pixels, 60 % hidden.

    22 of 36 patches are hidden: three quarters would leave nine, too few to recognise a shape (docs/LOG.md).

    unmask pretrain shapes --recipe demo_shapes --budget 2m
    """
    return Config(
        recipe="demo_shapes",
        method=mae.Config(
            encoder=ViTConfig(width=96, depth=4, heads=3, patch=(4, 4)),
            decoder=DecoderConfig(width=64, depth=1, heads=2),
            mask_ratio=0.6,
            target="pixels",
        ),
        data=DataConfig(source="shapes", size=(24, 24), crop=CropConfig(kind="center", flip=0)),
        optim=OptimConfig(base_lr=1e-2),  # learning rate 5e-3; many small steps are better than a few large ones
        train=TrainConfig(steps=5000, batch_size=128, checkpoint_every=1000, picture_images=6),
    )


def demo_digits() -> Config:
    """scikit-learn's handwritten digits, 8 pixels: 64 x 2 encoder, patch 2, plain pixels.

    unmask pretrain digits --recipe demo_digits
    """
    return Config(
        recipe="demo_digits",
        method=mae.Config(
            encoder=ViTConfig(width=64, depth=2, heads=2, patch=(2, 2)),
            decoder=DecoderConfig(width=48, depth=1, heads=2),
            target="pixels",
        ),
        data=DataConfig(source="digits", size=(8, 8), crop=CropConfig(kind="center", flip=0)),
        optim=OptimConfig(base_lr=2e-3),
        train=TrainConfig(steps=800, batch_size=128, checkpoint_every=1000),
    )
