"""CrossMAE recipes: for 32-pixel images, and the paper's ViT-B/16.

The official code multiplies the learning rate by predict ratio / mask ratio, because the loss is a mean over fewer
patches. The base learning rate of `crossmae_base` is the paper's, multiplied by this ratio: when you change a ratio,
change `optim.base_lr`, too.
"""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import crossmae
from unmask.nn.decoders import DecoderConfig
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig


def crossmae_nano() -> Config:
    """CrossMAE for images of 32 to 64 pixels on any processor: 192 x 6 encoder, patch 4, decoder 96 x 4.

    unmask pretrain DATA --recipe crossmae_nano [--set data.size=64 --set method.encoder.patch=8]

    It has the encoder and settings of mae_nano. Its decoder's 16 query tokens attend to 17 visible ones, so a step is a
    tenth faster than with mae_nano, despite two more decoder blocks. Differs from the paper: images and network are
    smaller; the learning rate is not scaled by predict ratio / mask ratio, because small runs have few updates.
    """
    return Config(
        recipe="crossmae_nano",
        method=crossmae.Config(
            encoder=ViTConfig(width=192, depth=6, heads=3, patch=(4, 4)),
            decoder=DecoderConfig(width=96, depth=4, heads=3),
        ),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=3e-3),
        train=TrainConfig(batch_size=128, epochs=100),
    )


def crossmae_base() -> Config:
    """The paper's ViT-B/16: mask ratio 0.75, a third of the hidden patches predicted, decoder 512 x 12 over all layers.

    unmask pretrain DATA --recipe crossmae_base

    Published, 800 epochs: 83.5 % ImageNet-1K top-1 fine-tuned at 224 pixels (MAE: 83.3 %); 83.7 % if all hidden patches
    are predicted (`--set method.predict_ratio=0.75 --set optim.base_lr=1.5e-4`).

    Differs from the paper: images are normalised with mean and standard deviation of the data instead of ImageNet's;
    epochs follow one another without dropping the last batch; warm-up is 5 % of the steps (40 of 800 epochs), so longer
    training warms up longer.
    """
    return Config(
        recipe="crossmae_base",
        method=crossmae.Config(
            encoder=ViTConfig(width=768, depth=12, heads=12),
            decoder=DecoderConfig(width=512, depth=12, heads=16),
        ),
        data=DataConfig(size=(224, 224), crop=CropConfig(scale=(0.2, 1.0), flip=0.5, eval_share=0.875)),
        optim=OptimConfig(base_lr=1.5e-4 * 0.25 / 0.75, betas=(0.9, 0.95), weight_decay=0.05, warmup=40 / 800),
        train=TrainConfig(batch_size=4096, epochs=800),
    )
