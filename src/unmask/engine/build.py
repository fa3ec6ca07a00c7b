"""Build a method from its configuration."""

from __future__ import annotations

import torch

from unmask.batch import ImageSpec
from unmask.config import Config
from unmask.method import Method
from unmask.nn.default_dtype import float32_default


def build_method(config: Config, images: ImageSpec) -> Method:
    """Return the method on the CPU, with random initial weights from `train.seed`.

    Only the initialisation of weights uses torch's generator (data order, crops and masks use `rng.py`). The
    generator's state is restored for the caller.
    """
    with torch.random.fork_rng(devices=[]), float32_default():
        torch.manual_seed(config.train.seed)
        return config.build(images)
