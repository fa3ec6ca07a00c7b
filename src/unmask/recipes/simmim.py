"""SimMIM recipes: for 32-pixel images, and the paper's ViT-B/16."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import simmim
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig


def simmim_nano() -> Config:
    """SimMIM for images of 32 to 64 pixels on any processor: 192 x 6 encoder, patch 4, cells of 2 x 2 patches.

    unmask pretrain DATA --recipe simmim_nano [--set data.size=64 --set method.encoder.patch=8]

    It has the encoder of mae_nano, but encodes all 64 patches, so a step takes two and a half times as long as with
    mae_nano. In each image, 10 of 16 cells of 8 x 8 pixels are hidden. The base learning rate of 3e-3 was better than
    1e-3 after 120 steps on CIFAR-10 (loss 0.63 and 0.67); with the relative bias instead of positions the loss was
    0.71. Differs from the paper: images and network are smaller, positions are sine-cosine, and optimiser settings are
    those of mae_nano, with SimMIM's gradient clipping.
    """
    return Config(
        recipe="simmim_nano",
        method=simmim.Config(encoder=ViTConfig(width=192, depth=6, heads=3, patch=(4, 4))),
        data=DataConfig(size=(32, 32), crop=CropConfig(scale=(0.67, 1.0), interpolation="bilinear")),
        optim=OptimConfig(base_lr=3e-3, clip=5.0),
        train=TrainConfig(batch_size=128, epochs=100),
    )


def simmim_base() -> Config:
    """The paper's ViT-B/16 at 224 pixels: 30 of 49 cells of 32 pixels hidden, 800 epochs at batch 2048.

    unmask pretrain DATA --recipe simmim_base

    Published: 83.8 % ImageNet-1K top-1 fine-tuned.

    Differs from the paper: the learning rate follows a cosine, while the paper divides it by ten after epoch 700;
    there is no stochastic depth (official: 0.1); images are normalised with mean and standard deviation of the data
    instead of ImageNet's; epochs follow one another without dropping the last batch; warm-up is a share of the steps
    (10 of 800 epochs) and starts at 0.
    """
    return Config(
        recipe="simmim_base",
        method=simmim.Config(
            encoder=ViTConfig(width=768, depth=12, heads=12, positions="absent", relative_bias=True, layer_scale=0.1)
        ),
        data=DataConfig(
            size=(224, 224), crop=CropConfig(scale=(0.67, 1.0), flip=0.5, eval_share=0.875, interpolation="bilinear")
        ),
        optim=OptimConfig(
            base_lr=1e-4 * 256 / 512, betas=(0.9, 0.999), weight_decay=0.05, warmup=10 / 800, clip=5.0
        ),  # the official base rate is for 512 images
        train=TrainConfig(batch_size=2048, epochs=800),
    )
