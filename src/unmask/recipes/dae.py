"""Denoising autoencoders for small images; the corruptions are settings."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.methods import dae
from unmask.nn.dense import DenseConfig
from unmask.optim import OptimConfig


def dae_nano() -> Config:
    """Images of 32 to 64 pixels on any processor: the network of ae_nano, a quarter of the values masked.

    unmask pretrain DATA --recipe dae_nano
    unmask pretrain DATA --recipe dae_nano --set method.grain=4 --set method.share=0.75 --set method.beta=0
    unmask pretrain DATA --recipe dae_nano --set method.corruption=gaussian --set method.sigma=0.5
    unmask pretrain DATA --recipe dae_nano --set method.corruption=gray

    The second command masks patches of 4 x 4 pixels and predicts only these, as MAE does. A share of a quarter was best
    in the paper (10 to 40 % are about as good). The sizes are not from a paper.
    """
    return Config(
        recipe="dae_nano",
        method=dae.Config(encoder=DenseConfig(hidden=(1024, 512), code=192)),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=2e-3),
        train=TrainConfig(batch_size=128, epochs=100),
    )
