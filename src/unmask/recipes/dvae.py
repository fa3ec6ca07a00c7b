"""Tokenizer recipes, from 32-pixel images to DALL-E's own: dVAEs for BEiT, and for MAE with token targets."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import dvae
from unmask.nn.conv_vae import ConvVAEConfig
from unmask.optim import OptimConfig


def dvae_nano() -> Config:
    """A tokenizer for images of 32 to 64 pixels on any processor: 256 codes, one per 4 x 4 pixels.

    unmask pretrain DATA --recipe dvae_nano --out runs/tokenizer
    unmask pretrain DATA --recipe beit_nano --tokenizer runs/tokenizer

    The tokenizer is usable if the perplexity in metrics.jsonl is more than a quarter of the codebook and the
    reconstructions resemble the images. Not from a paper. On CIFAR-10 after 800 steps (about four minutes on one core),
    in the last batch: perplexity 134, mean square error of normalised pixels 0.061. With a KL weight of 2e-3,
    perplexity was 87 and the error 0.061; with this KL weight and a fifth of the learning rate, perplexity was 53 and
    the error 0.094.
    """
    return Config(
        recipe="dvae_nano",
        method=dvae.Config(
            encoder=ConvVAEConfig(codes=256, width=64, depth=2, patch=(4, 4)),
            temperature_share=0.8,
            kl_weight=5e-3,
            kl_share=0.2,
        ),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-4),
        train=TrainConfig(batch_size=128, epochs=20),
    )


def dvae_small() -> Config:
    """A tokenizer for photographs on one GPU: 112 pixels, 2048 codes, one per 8 x 8 pixels.

    unmask pretrain DATA --recipe dvae_small --out runs/tokenizer

    A view of 112 pixels has 14 x 14 codes, one for each patch of a ViT with patch 16 at 224 pixels (BEiT's grid).
    Estimated, not yet measured on a GPU: the 50 epochs take 1 to 2 hours for 100,000 photographs.
    """
    return Config(
        recipe="dvae_small",
        method=dvae.Config(
            encoder=ConvVAEConfig(codes=2048, width=128, depth=3, patch=(8, 8)),
            temperature_share=0.8,
            kl_weight=5e-4,
            kl_share=0.2,
        ),
        data=DataConfig(size=(112, 112), crop=CropConfig(eval_share=0.875)),
        optim=OptimConfig(base_lr=5e-4, betas=(0.9, 0.999), weight_decay=1e-4),
        train=TrainConfig(batch_size=256, epochs=50),
    )


def dvae_dalle() -> Config:
    """The paper's dVAE (97.6 M parameters): 256 pixels, 8192 codes, one per 8 x 8 pixels, 3 M steps at batch 512.

    unmask pretrain DATA --recipe dvae_dalle

    Appendix A: AdamW (0.9, 0.999), weight decay 1e-4, learning rate 1e-4 falling to 1.25e-6, temperature 1 to 1/16 in
    150,000 steps, KL weight 6.6 / 192 in 5,000. The Gumbel noise, one number for every code at every position, comes
    from a counter-based generator, which is slower than the one of the paper.

    Differs from the paper: the learning rate falls over all 3 M steps (in the paper over 1.2 M); crops are
    random-resized with at least 0.44 of the area (in the paper the shorter side is resized to 9/8 to 12/8 of 256, then
    cropped); the weights are not averaged.
    """
    return Config(
        recipe="dvae_dalle",
        method=dvae.Config(
            encoder=ConvVAEConfig(arch="dalle", codes=8192, width=256, patch=(8, 8), loss="logit_laplace"),
        ),
        data=DataConfig(size=(256, 256), crop=CropConfig(scale=(0.44, 0.79), ratio=(1, 1), eval_share=0.875)),
        optim=OptimConfig(base_lr=0.5e-4, betas=(0.9, 0.999), weight_decay=1e-4, warmup=0, final_lr=0.0125),
        train=TrainConfig(batch_size=512, steps=3_000_000),
    )
