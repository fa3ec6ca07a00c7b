"""Recipes of `unmask finetune`.

The encoder, the image size and the classes are replaced by those of the Run and the data; all other settings apply.
`--recipe auto` chooses by the size of the encoder and the number of labelled images.
"""

from __future__ import annotations

from types import ModuleType

from unmask.config import Config, DataConfig, TrainConfig
from unmask.data.augment import CropConfig
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig
from unmask.tasks import classify, detect, linear_probe, segment

PAPER_CROP = CropConfig(scale=(0.08, 1.0), eval_share=0.875)  # at more than 224 pixels `crop_for` sets eval_share to 1
SMALL_CROP = CropConfig(scale=(0.4, 1.0))
DENSE_CROP = CropConfig(scale=(0.25, 1.0))
FROM_SCRATCH = {"head_std": classify.SCRATCH_STD}  # MAE's 2e-5 is for heads on pre-trained weights
NANO = ViTConfig(width=192, depth=12, heads=3, patch=(4, 4))
BASE = ViTConfig(width=768, depth=12, heads=12)
LARGE = ViTConfig(width=1024, depth=24, heads=16)
HUGE = ViTConfig(width=1280, depth=32, heads=16, patch=(14, 14))


def finetune_few() -> Config:
    """Up to 1,000 labelled images: 150 epochs in small batches, strong layer-wise decay.

    unmask finetune RUN DATA --recipe finetune_few
    """
    return _small("finetune_few", base_lr=4e-3, layer_decay=0.65, batch_size=32, epochs=150)


def finetune_some() -> Config:
    """1,000 to 10,000 labelled images: 60 epochs.

    unmask finetune RUN DATA --recipe finetune_some
    """
    return _small("finetune_some", base_lr=4e-3, layer_decay=0.75, batch_size=64, epochs=60)


def finetune_nano() -> Config:
    """More than 10,000 labelled images and an encoder smaller than ViT-B: 100 epochs, as in published results.

    unmask finetune RUN DATA --recipe finetune_nano
    """
    return _small("finetune_nano", base_lr=2e-3, layer_decay=0.75, batch_size=128, epochs=100, mixup=0.8, cutmix=1.0)


def finetune_base() -> Config:
    """ViT-B as official MAE fine-tunes it on ImageNet-1K (FINETUNE.md): 83.664 % with the released weights.

    unmask finetune RUN DATA --recipe finetune_base

    7 h 11 min on 32 V100 GPUs (published).
    """
    return _paper("finetune_base", BASE, epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1)


def finetune_large() -> Config:
    """ViT-L as official MAE fine-tunes it on ImageNet-1K (FINETUNE.md): 85.952 % with the released weights.

    unmask finetune RUN DATA --recipe finetune_large

    8 h 52 min on 32 V100 GPUs (published).
    """
    return _paper("finetune_large", LARGE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)


def finetune_huge() -> Config:
    """ViT-H as official MAE fine-tunes it on ImageNet-1K (FINETUNE.md): 86.928 % with the released weights.

    unmask finetune RUN DATA --recipe finetune_huge

    13 h 9 min on 64 V100 GPUs (published).
    """
    return _paper("finetune_huge", HUGE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3)


def scratch_few() -> Config:
    """The control of finetune_few: random weights, no layer decay, longer warm-up, averaged weights.

    unmask finetune RUN DATA --from-scratch
    """
    return _small("scratch_few", base_lr=4e-3, batch_size=32, epochs=150)


def scratch_some() -> Config:
    """The control of finetune_some: random weights, no layer decay, longer warm-up, averaged weights.

    unmask finetune RUN DATA --from-scratch
    """
    return _small("scratch_some", base_lr=4e-3, batch_size=64, epochs=60)


def scratch_nano() -> Config:
    """The control of finetune_nano: random weights, no layer decay, longer warm-up, averaged weights.

    unmask finetune RUN DATA --from-scratch
    """
    return _small("scratch_nano", base_lr=2e-3, batch_size=128, epochs=100, mixup=0.8, cutmix=1.0)


def scratch_base() -> Config:
    """ViT-B from scratch on ImageNet-1K (MAE, Table 11): 82.3 % with the moving average of weights, 82.1 % without.

    unmask finetune RUN DATA --from-scratch
    """
    return _from_scratch("scratch_base", BASE, epochs=300, drop_path=0.1)


def scratch_large() -> Config:
    """ViT-L and ViT-H from scratch on ImageNet-1K (MAE, Table 11): 82.6 and 83.1 % (81.5 and 80.9 % without averaging).

    unmask finetune RUN DATA --from-scratch
    """
    return _from_scratch("scratch_large", LARGE, epochs=200, drop_path=0.2)


def segment_nano() -> Config:
    """Semantic segmentation with a small encoder: a UPerNet-like head, crops of at least a quarter of the image.

    unmask finetune RUN DATA --task segment [--annotations MASKS] [--ignore ID] --set data.size=[96,128]
    """
    return _dense("segment_nano", segment, NANO, size=(96, 128), base_lr=8e-3, head=128, epochs=100)


def segment_base() -> Config:
    """Semantic segmentation with ViT-B or larger, after MAE's and BEiT's UPerNet on ADE20K: batch 16, AdamW, 1e-4.

    unmask finetune RUN DATA --task segment --set data.size=512

    Published on ADE20K, 160,000 steps: 48.1 (ViT-B) and 53.6 (ViT-L) mIoU. As in BEiT's code the head reads blocks 4,
    6, 8 and 12 of 12 (8, 12, 16 and 24 of 24).
    """
    return _dense("segment_base", segment, BASE, size=(512, 512), base_lr=1.6e-3, head=256, epochs=130)


def detect_nano() -> Config:
    """Detection with a small encoder: a simple feature pyramid and an anchor-free head.

    unmask finetune RUN DATA --task detect [--annotations FILE] [--split train] --set data.size=[192,256]
    """
    return _dense("detect_nano", detect, NANO, size=(192, 256), base_lr=8e-3, head=96, epochs=100)


def detect_base() -> Config:
    """Detection with ViT-B or larger: batch 16 at a peak rate of 1e-4 (ViTDet: 64 at 1e-4, weight decay 0.1).

    unmask finetune RUN DATA --task detect --set data.size=1024

    Published for Mask R-CNN heads on COCO: 50.3 (ViT-B) and 53.3 (ViT-L) box AP; this recipe has a different head.
    """
    return _dense("detect_base", detect, BASE, size=(1024, 1024), base_lr=1.6e-3, head=256, epochs=50)


def linear_paper() -> Config:
    """MAE's linear probe with its published protocol: LARS, batch 16384, 90 epochs, BatchNorm (Table 10).

    unmask probe RUN DATA --kind paper-linear

    Published on ImageNet-1K: 68.0 (ViT-B), 75.8 (ViT-L), 76.6 % (ViT-H); about 2 h 20 min on 32 V100 GPUs (ViT-B).
    """
    return Config(
        recipe="linear_paper",
        method=linear_probe.Config(encoder=BASE, classes=("one", "other")),
        data=DataConfig(crop=PAPER_CROP),
        optim=OptimConfig(name="lars", base_lr=0.1, betas=(0.9, 0.999), weight_decay=0, warmup=10 / 90),
        train=TrainConfig(batch_size=16384, epochs=90),
    )


def _dense(
    name: str, task: ModuleType, encoder: ViTConfig, *, size: tuple[int, int], base_lr: float, head: int, epochs: float
) -> Config:
    method = {"encoder": encoder, "classes": ("one", "other"), "drop_path": 0.1, "width": head}
    method |= {"feature_blocks": "beit"} if task is segment else {}
    return Config(
        recipe=name,
        method=task.Config.model_validate(method),
        data=DataConfig(size=size, crop=DENSE_CROP),
        optim=OptimConfig(
            base_lr=base_lr, betas=(0.9, 0.999), weight_decay=0.05, warmup=0.05, layer_decay=0.75, clip=1.0
        ),
        train=TrainConfig(batch_size=16, epochs=epochs),
    )


def _method(encoder: ViTConfig, **settings: float) -> classify.Config:
    return classify.Config.model_validate({"encoder": encoder, "classes": ("one", "other"), **settings})


def _small(
    name: str, *, base_lr: float, batch_size: int, epochs: float, layer_decay: float | None = None, **mixing: float
) -> Config:
    """Return a recipe for small encoders.

    layer_decay: the factor of layer-wise learning-rate decay, or None for training from scratch, with the same rate in
    all layers and a moving average of the weights.
    """
    scratch: dict[str, float] = {"warmup": 0.1, "average": 0.999}
    return Config(
        recipe=name,
        method=_method(NANO, drop_path=0.1, **mixing, **(FROM_SCRATCH if layer_decay is None else {})),
        data=DataConfig(size=(32, 32), crop=SMALL_CROP),
        optim=OptimConfig.model_validate(
            {"base_lr": base_lr, "betas": (0.9, 0.999), "weight_decay": 0.05}
            | (scratch if layer_decay is None else {"layer_decay": layer_decay})
        ),
        train=TrainConfig(batch_size=batch_size, epochs=epochs),
    )


def _paper(
    name: str, encoder: ViTConfig, *, epochs: float, base_lr: float, layer_decay: float, drop_path: float
) -> Config:
    return Config(
        recipe=name,
        method=_method(encoder, drop_path=drop_path, mixup=0.8, cutmix=1.0, rand_augment=9, erasing=0.25),
        data=DataConfig(crop=PAPER_CROP),
        optim=OptimConfig(
            base_lr=base_lr,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=5 / epochs,
            final_lr=1e-6 / (4 * base_lr),  # final learning rate 1e-6 at batch size 1024
            layer_decay=layer_decay,
        ),
        train=TrainConfig(batch_size=1024, epochs=epochs),
    )


def _from_scratch(name: str, encoder: ViTConfig, *, epochs: float, drop_path: float) -> Config:
    return Config(
        recipe=name,
        method=_method(encoder, drop_path=drop_path, mixup=0.8, cutmix=1.0, rand_augment=9, **FROM_SCRATCH),
        data=DataConfig(crop=PAPER_CROP),
        optim=OptimConfig(base_lr=1e-4, weight_decay=0.3, warmup=20 / epochs, average=0.9999),
        train=TrainConfig(batch_size=4096, epochs=epochs),
    )
