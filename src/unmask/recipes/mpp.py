"""Recipes for ViT's masked patch prediction: for 32-pixel images, and the paper's ViT-B/16.

`--set method.target=colours_4x4` or `pixels` chooses one of the paper's two other targets.
"""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import mpp
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig


def mpp_nano() -> Config:
    """Masked patch prediction for images of 32 to 64 pixels on any processor: 192 x 6 encoder, patch 4.

    unmask pretrain DATA --recipe mpp_nano [--set method.target=colours_4x4]

    It has the encoder of mae_nano with the paper's learned positions. The encoder runs on all 64 patches, so a step
    takes two and a half times as long as with mae_nano. The base learning rate of 3e-3 was better than 1e-3 after 300
    steps on CIFAR-10 (cross-entropy 2.31 and 2.50, with fixed positions). Differs from the paper: images and network
    are smaller, and optimiser settings are those of mae_nano.
    """
    return Config(
        recipe="mpp_nano",
        method=mpp.Config(encoder=ViTConfig(width=192, depth=6, heads=3, patch=(4, 4), positions="learned")),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=3e-3),
        train=TrainConfig(batch_size=128, epochs=100),
    )


def mpp_base() -> Config:
    """The paper's ViT-B/16, mean colours at 3 bits: 100,000 steps at batch 4096.

    unmask pretrain DATA --recipe mpp_base

    Published: 79.9 % ImageNet-1K top-1 fine-tuned, 2 points above training from scratch and 4 below supervised
    pre-training, after 1,000,000 steps on JFT-300M; the paper reports most of the gain after 100,000 steps, and similar
    gains from pre-training on ImageNet.

    Differs from the paper: 100,000 steps instead of 1,000,000 (`--set train.steps=1000000 --set optim.warmup=0.01`);
    crops and flips are MAE's; weight decay is that of the paper's supervised pre-training (0.1); there is no dropout;
    images are normalised with mean and standard deviation of the data.
    """
    return Config(
        recipe="mpp_base",
        method=mpp.Config(encoder=ViTConfig(width=768, depth=12, heads=12, positions="learned")),
        data=DataConfig(size=(224, 224), crop=CropConfig(scale=(0.2, 1.0), flip=0.5, eval_share=0.875)),
        optim=OptimConfig(base_lr=2e-4 * 256 / 4096, betas=(0.9, 0.999), weight_decay=0.1, warmup=0.1),
        train=TrainConfig(batch_size=4096, steps=100_000),
    )
