"""Build a method from its configuration."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from unmask.batch import ImageSpec
from unmask.config import Config
from unmask.method import Method
from unmask.nn.default_dtype import float32_default
from unmask.nn.meta_parameters import parameters_on_meta


def build_method(config: Config, images: ImageSpec, *, empty: bool = False) -> Method:
    """Return the method on the CPU, with random initial weights from `train.seed`.

    empty: whether the parameters are on the meta device, without values or memory. Buffers have their values.

    Only the initialisation of weights uses torch's generator (data order, crops and masks use `rng.py`). The
    generator's state is restored for the caller.
    """
    with torch.random.fork_rng(devices=[]), float32_default():
        torch.manual_seed(config.train.seed)
        with parameters_on_meta() if empty else nullcontext():
            return config.build(images)
