"""AdamW with MAE's parameter groups, and the learning rate as a function of the step.

There is no scheduler object: `learning_rate(step, ...)` is pure, so a resumed run needs nothing but the step number.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unmask.settings import Settings

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Settings):
    """AdamW (MAE, Table 8). The peak learning rate is base_lr x batch size / 256.

    warmup: share of all steps with a linear rise from 0 (MAE: 40 of 800 epochs). After it half a cosine down to
    final_lr x peak. clip: greatest gradient norm, None for no clipping.
    """

    base_lr: float = Field(default=1.5e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0)


def peak_lr(config: OptimConfig, batch_size: int) -> float:
    """The base-lr rule: scaled by the GLOBAL batch (accumulation and ranks included) over 256."""
    return config.base_lr * batch_size / 256


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, final: float = 0.0) -> float:
    """Learning rate of optimiser step `step` (0-based), per iteration: linear from 0, then half a cosine to `final`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; 1-D tensors (biases, norm gains) are not decayed.

    cls and mask tokens are 3-D and therefore are decayed, as upstream. Fused, because that kernel can skip a
    non-finite step on the device, without waiting for the host to look.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # lr as a number, not a tensor: it is written by hand before every step.
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def update(optimizer: torch.optim.Optimizer, lr: float, loss: Tensor, clip: float | None) -> Tensor:
    """One step with the gradients as they are, which are then cleared; returns their norm before clipping (0-d).

    When `loss` (0-d) or the norm is not finite, weights and moments stay as they were, bit for bit. The device decides;
    the host does not wait for it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # The fused kernel's own gate, the one gradient scalers use: 1 means "leave everything as it is".
    optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    return norm
