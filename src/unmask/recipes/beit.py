"""BEiT recipes. All BEiT recipes need a tokenizer: `unmask pretrain DATA --recipe dvae_nano --out runs/tokenizer`."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import beit
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig


def beit_nano() -> Config:
    """Images of 32 to 64 pixels on any processor: 192 x 6 encoder, patch 4, codes of a dVAE with patch 4.

    unmask pretrain DATA --recipe dvae_nano --out runs/tokenizer
    unmask pretrain DATA --recipe beit_nano --tokenizer runs/tokenizer

    Positions are fixed sine-cosine ones, as in the other nano recipes, so that the methods can be compared. Relative
    bias and LayerScale are off; enable them with --set method.encoder.relative_bias=true and --set
    method.encoder.layer_scale=0.1.
    """
    return Config(
        recipe="beit_nano",
        method=beit.Config(encoder=ViTConfig(width=192, depth=6, heads=3, patch=(4, 4))),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=3e-3, betas=(0.9, 0.999), clip=3.0),
        train=TrainConfig(batch_size=128, epochs=100),
    )


def beit_base() -> Config:
    """BEiT-B/16 at 224 pixels, 800 epochs at batch 2048; its tokenizer has one code per 8 x 8 pixels.

    unmask pretrain DATA --recipe dvae_small --out runs/tokenizer
    unmask pretrain DATA --recipe beit_base --tokenizer runs/tokenizer

    The recipes `dvae_small` and `dvae_dalle` train such tokenizers.

    Published: 83.2 % fine-tuned on ImageNet-1K with DALL-E's tokenizer, 82.7 % after 300 epochs with a tokenizer
    trained on ImageNet-1K; linear probe of the best layer 56.7 %.

    Differs from the paper: see `methods/beit.py`. The learning rate (1.5e-3 falling to 1e-5), gradient clipping and
    betas are those of the paper.
    """
    return _paper("beit_base", ViTConfig(width=768, depth=12, heads=12, positions="absent", relative_bias=True,
                                         layer_scale=0.1), clip=3.0)  # fmt: skip


def beit_large() -> Config:
    """BEiT-L/16 at 224 pixels, 800 epochs at batch 2048, with a tokenizer of 14 x 14 codes.

    unmask pretrain DATA --recipe beit_large --tokenizer runs/tokenizer

    Published: 85.2 % fine-tuned, linear probe of the best layer 73.5 %.

    Differs from the paper in the same way as `beit_base`. LayerScale starts at 1e-5, and gradients are clipped at 1.
    """
    return _paper("beit_large", ViTConfig(width=1024, depth=24, heads=16, positions="absent", relative_bias=True,
                                          layer_scale=1e-5), clip=1.0)  # fmt: skip


def _paper(name: str, encoder: ViTConfig, clip: float) -> Config:
    peak = 1.5e-3
    return Config(
        recipe=name,
        method=beit.Config(encoder=encoder),
        data=DataConfig(size=(224, 224), crop=CropConfig(scale=(0.08, 1.0), flip=0.5, jitter=0.4, eval_share=0.875)),
        optim=OptimConfig(
            base_lr=peak * 256 / 2048, betas=(0.9, 0.999), warmup=10 / 800, final_lr=1e-5 / peak, clip=clip
        ),
        train=TrainConfig(batch_size=2048, epochs=800),
    )
