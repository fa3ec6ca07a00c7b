"""MAE recipes, from 32-pixel images to the three models of the paper.

`mae_base`, `mae_large` and `mae_huge` have exactly the settings of He et al. 2021, Table 8, for 800 epochs. Differs
from the paper: images are normalised with the mean and standard deviation of the data instead of ImageNet's; epochs
follow one another without dropping the last, incomplete batch; warm-up is a share of the steps (40 of 800 epochs), so
longer training warms up longer. Published percentages are ImageNet-1K top-1 at 224 pixels. The small recipes adapt the
settings to small data and one machine: a decoder no wider than the encoder and at most four blocks deep (the paper's
512 x 8 decoder takes more than half of the compute even with ViT-B), at least 16 visible patches, and a higher base
learning rate at a smaller batch.
"""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import mae
from unmask.nn.decoders import DecoderConfig
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig


def mae_nano() -> Config:
    """Images of 32 to 64 pixels on any processor: 192 x 6 encoder, patch 4, decoder 96 x 2.

    unmask pretrain DATA --recipe mae_nano [--set data.size=64 --set method.encoder.patch=8]

    About 30 minutes on two CPU cores are enough to see that it works on CIFAR-10 (measured figures: docs/LOG.md).
    """
    return Config(
        recipe="mae_nano",
        method=mae.Config(
            encoder=ViTConfig(width=192, depth=6, heads=3, patch=(4, 4)),
            decoder=DecoderConfig(width=96, depth=2, heads=3),
        ),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=3e-3),  # learning rate 1.5e-3 at this batch size
        train=TrainConfig(batch_size=128, epochs=100),
    )


def mae_tiny() -> Config:
    """Small images (64 to 128 pixels) on one small GPU, or slowly on a CPU: ViT-Tiny 192 x 12, decoder 192 x 2.

    unmask pretrain DATA --recipe mae_tiny

    Estimated, not yet measured on a GPU: the 400 epochs take 1 to 3 hours for 100,000 images on one GPU with 8 GiB or
    more, if the CPU decodes fast enough, and weeks on a few CPU cores. `unmask check DATA` measures your machine.
    """
    return Config(
        recipe="mae_tiny",
        method=mae.Config(
            encoder=ViTConfig(width=192, depth=12, heads=3, patch=(8, 8)),
            decoder=DecoderConfig(width=192, depth=2, heads=3),
        ),
        data=DataConfig(size=(96, 96)),
        optim=OptimConfig(base_lr=5e-4),
        train=TrainConfig(batch_size=512, epochs=400),
    )


def mae_small() -> Config:
    """Photographs on one GPU: ViT-S/16 at 224 pixels, 384 x 12, decoder 256 x 4.

    unmask pretrain DATA --recipe mae_small

    Estimated, not yet measured on a GPU: the 400 epochs take 5 to 15 hours for 100,000 photographs on one GPU with 16
    GiB or more, if the CPU decodes fast enough (a dozen cores). `unmask check DATA` measures your machine.
    """
    return Config(
        recipe="mae_small",
        method=mae.Config(
            encoder=ViTConfig(width=384, depth=12, heads=6),
            decoder=DecoderConfig(width=256, depth=4, heads=8),
        ),
        data=DataConfig(crop=CropConfig(flip=0.5, eval_share=0.875)),
        optim=OptimConfig(base_lr=1.5e-4),
        train=TrainConfig(batch_size=1024, epochs=400),
    )


def mae_base() -> Config:
    """The paper's ViT-B/16 (111.9 M parameters with decoder): Table 8, 800 epochs at batch 4096.

    unmask pretrain DATA --recipe mae_base

    Published: 83.6 % fine-tuned and 68.0 % with a linear probe after 1600 epochs (paper, Table 3); 83.3 % and 65.1 %
    after 800 epochs (reproductions).

    Differs from the paper: images are normalised with mean and standard deviation of the data instead of ImageNet's;
    epochs follow one another without dropping the last batch; warm-up is 5 % of the steps (40 of 800 epochs), so longer
    training warms up longer.
    """
    return _paper("mae_base", ViTConfig(width=768, depth=12, heads=12))


def mae_large() -> Config:
    """The paper's ViT-L/16 (329.5 M parameters with decoder).

    unmask pretrain DATA --recipe mae_large

    Published: 85.4 % fine-tuned after 800 epochs with pixels normalised within each patch, as here (Table 1d), 84.9 %
    with plain pixels; 85.9 % after 1600 epochs.

    Differs from the paper in the same way as `mae_base` (mean and std of the data, no batch dropped, warm-up as a share
    of the steps).
    """
    return _paper("mae_large", ViTConfig(width=1024, depth=24, heads=16))


def mae_huge() -> Config:
    """The paper's ViT-H/14 (657.1 M parameters with decoder): patch 14, 256 patches.

    unmask pretrain DATA --recipe mae_huge

    Published: 86.9 % fine-tuned after 1600 epochs; this recipe trains for 800; use `--set train.epochs=1600` for the
    paper's length.

    Differs from the paper in the same way as `mae_base` (mean and std of the data, no batch dropped, warm-up as a share
    of the steps).
    """
    return _paper("mae_huge", ViTConfig(width=1280, depth=32, heads=16, patch=(14, 14)))


def _paper(name: str, encoder: ViTConfig) -> Config:
    return Config(
        recipe=name,
        method=mae.Config(encoder=encoder, decoder=DecoderConfig(width=512, depth=8, heads=16)),
        data=DataConfig(size=(224, 224), crop=CropConfig(scale=(0.2, 1.0), flip=0.5, eval_share=0.875)),
        optim=OptimConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=40 / 800),
        train=TrainConfig(batch_size=4096, epochs=800),
    )
