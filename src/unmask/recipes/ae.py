"""Autoencoders: one for small images, and the one of 2006."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import ae
from unmask.nn.dense import DenseConfig
from unmask.optim import OptimConfig


def ae_nano() -> Config:
    """Images of 32 to 64 pixels on any processor: a code of 192 numbers, the token width of the other nano recipes.

    unmask pretrain DATA --recipe ae_nano

    Hidden layers of 1024 and 512 units, ReLU, mean square error. Not from a paper.
    """
    return Config(
        recipe="ae_nano",
        method=ae.Config(encoder=DenseConfig(hidden=(1024, 512), code=192)),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=2e-3),  # learning rate 1e-3 at this batch size
        train=TrainConfig(batch_size=128, epochs=100),
    )


def ae_hinton() -> Config:
    """The 784-1000-500-250-30 autoencoder of 2006: gray images of 28 pixels, logistic units, cross-entropy.

    unmask pretrain DATA --recipe ae_hinton

    2,837,314 parameters, a code of 30 numbers. Use `--set method.encoder.code=2` for the paper's map of digits.

    Differs from the paper: the network is trained end to end with AdamW, not layer by layer.
    """
    return Config(
        recipe="ae_hinton",
        method=ae.Config(encoder=DenseConfig(hidden=(1000, 500, 250), code=30, activation="sigmoid", loss="bce")),
        data=DataConfig(size=(28, 28), channels=1, crop=CropConfig(kind="center", flip=0)),
        optim=OptimConfig(base_lr=2e-3, weight_decay=0),
        train=TrainConfig(batch_size=128, epochs=200),
    )
