"""iGPT recipes: for small images on any processor, and the paper's three sizes at 32 x 32 tokens."""

from __future__ import annotations

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.methods import igpt
from unmask.nn.gpt import GPTConfig
from unmask.optim import OptimConfig


def igpt_nano() -> Config:
    """Images of 32 to 64 pixels on any processor: 192 x 6, 128 colours, 2 x 2 pixels per token, autoregressive.

    unmask pretrain DATA --recipe igpt_nano [--set data.size=64 --set method.encoder.patch=4]

    The network processes all 256 tokens, so a step takes several times as long as with mae_nano (see `unmask plan`).
    """
    return _nano("igpt_nano", "ar")


def igpt_bert_nano() -> Config:
    """igpt_nano with BERT's objective: 15 % of the tokens are hidden and predicted from all others.

    unmask pretrain DATA --recipe igpt_bert_nano
    """
    return _nano("igpt_bert_nano", "bert")


def igpt_s() -> Config:
    """The paper's iGPT-S (76 M parameters) at 32 x 32 tokens of 512 colours, 1 M steps at batch 128.

    unmask pretrain DATA --recipe igpt_s [--set method.objective=bert]

    Published, linear probe of the best layer: ImageNet 41.9 %; negative log-likelihood of test images: 2.0895 nats per
    token.

    Differs from the paper: see `methods/igpt.py`; warm-up is 1 % of the steps (in the paper one epoch of ImageNet);
    crops are squares of 34 to 77 % of the image's area. The paper resizes the shorter side to 256 to 384 pixels, crops
    a square of 224 (34 to 77 % of the area of a square image), and shrinks it to 32. The paper searched the learning
    rate from 0.01, 0.003, ... and did not publish the choice; 0.003 (L: 0.001) is a guess.
    """
    return _paper("igpt_s", width=512, depth=24, heads=8, base_lr=0.006)


def igpt_m() -> Config:
    """The paper's iGPT-M (455 M parameters) at 32 x 32 tokens of 512 colours.

    unmask pretrain DATA --recipe igpt_m

    Published, linear probe of the best layer: ImageNet 54.5 %; negative log-likelihood of test images: 2.0614 nats per
    token.

    Differs from the paper in the same way as `igpt_s`.
    """
    return _paper("igpt_m", width=1024, depth=36, heads=8, base_lr=0.006)


def igpt_l() -> Config:
    """The paper's iGPT-L (1362 M parameters) at 32 x 32 tokens of 512 colours.

    unmask pretrain DATA --recipe igpt_l

    Published, linear probe of the best layer: CIFAR-10 96.3 %, ImageNet 60.3 %; negative log-likelihood of test images:
    2.0466 nats per token.

    Differs from the paper in the same way as `igpt_s`.
    """
    return _paper("igpt_l", width=1536, depth=48, heads=16, base_lr=0.002)


def _nano(name: str, objective: str) -> Config:
    return Config(
        recipe=name,
        method=igpt.Config(
            encoder=GPTConfig(width=192, depth=6, heads=3, patch=(2, 2), colours=128),
            objective="ar" if objective == "ar" else "bert",
        ),
        data=DataConfig(size=(32, 32)),
        optim=OptimConfig(base_lr=3e-3, weight_decay=0),  # best base_lr in a search, for both objectives
        train=TrainConfig(batch_size=128, epochs=20),
    )


def _paper(name: str, *, width: int, depth: int, heads: int, base_lr: float) -> Config:
    return Config(
        recipe=name,
        method=igpt.Config(encoder=GPTConfig(width=width, depth=depth, heads=heads)),
        data=DataConfig(size=(32, 32), crop=CropConfig(scale=(0.34, 0.77), ratio=(1, 1), flip=0)),
        optim=OptimConfig(base_lr=base_lr, betas=(0.9, 0.95), weight_decay=0, warmup=0.01),
        train=TrainConfig(batch_size=128, steps=1_000_000),
    )
