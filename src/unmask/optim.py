"""AdamW with MAE's parameter groups, LARS for its linear probe, and the learning rate as a function of the step.

There is no scheduler object: `learning_rate(step, ...)` is a pure function, so a resumed run only needs the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unmask.method import Method
from unmask.nn.whole import whole
from unmask.settings import Settings

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Settings):
    """Settings of AdamW (MAE, Table 8) or LARS (MAE's linear probe). Peak learning rate: base_lr x batch size / 256.

    betas: AdamW's betas, of which LARS uses the first as its momentum.
    warmup: share of all steps during which the learning rate rises linearly from 0 (MAE: 40 of 800 epochs). After the
    warm-up, the rate falls along half a cosine to final_lr x peak.
    clip: maximum gradient norm (None: no clipping).
    layer_decay: for fine-tuning, the learning rate of each encoder layer divided by the learning rate of the next
    layer; the head has the full rate.
    average: decay of a moving average of the weights (`nn/ema.py`), or None for no average. MAE from scratch uses
    0.9999. The decay is smaller in the first steps.
    """

    name: Literal["adamw", "lars"] = "adamw"
    base_lr: float = Field(default=1.5e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    average: float | None = Field(default=None, gt=0, lt=1)


def peak_lr(config: OptimConfig, batch_size: int) -> float:
    """Return base_lr x batch size / 256. batch_size: images per optimiser step, over all micro-batches."""
    return config.base_lr * batch_size / 256


def learning_rate(step: float, *, steps: int, warmup_steps: int, peak: float, final: float = 0.0) -> float:
    """Return the learning rate of optimiser step `step` (0-based).

    It rises linearly from 0 to `peak` and then falls along half a cosine to `final`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


TRUST = 1e-3


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as in MAE's linear probe (`util/lars.py`, after MoCo v3).

    For weight matrices, the gradient plus weight decay is scaled to TRUST x the norm of the matrix; gradients of 1-D
    tensors are not scaled. The momentum accumulates scaled gradients and is multiplied by the learning rate. A step
    changes nothing if `found_inf` is set.
    """

    def __init__(self, groups: Any, momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        good = True if self.found_inf is None else self.found_inf == 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                change, state = parameter.grad, self.state[parameter]
                if parameter.ndim > 1:
                    change = change + group["weight_decay"] * parameter
                    own, its = parameter.norm(), change.norm()
                    change = change * torch.where((own > 0) & (its > 0), TRUST * own / its, 1.0)
                before = state.get("momentum", torch.zeros_like(parameter))
                moved = before * group["momentum"] + change
                if isinstance(good, Tensor):
                    moved = torch.where(good, moved, before)
                    parameter.copy_(torch.where(good, parameter - group["lr"] * moved, parameter))
                else:
                    parameter.sub_(group["lr"] * moved)
                state["momentum"] = moved


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW | Lars:
    """Return AdamW or LARS over the trainable parameters of a method.

    1-D parameters and the parameters named in the method's `undecayed` have no weight decay. Class and mask tokens are
    3-D and therefore have weight decay, as in MAE's code. AdamW is fused, because the fused kernel can skip a
    non-finite step on the device, without synchronising with the host.
    """
    undecayed = module.undecayed if isinstance(module, Method) else ()
    scales = layer_scales(module, config.layer_decay)
    groups: dict[tuple[float, bool], dict] = {}
    for decayed in (True, False):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or decayed != (parameter.ndim > 1 and name not in undecayed):
                continue
            key = scales.get(name, 1.0), decayed
            about = {"params": [], "weight_decay": config.weight_decay if decayed else 0.0, "lr_scale": key[0]}
            groups.setdefault(key, about)["params"].append(parameter)
    if config.name == "lars":
        return Lars(list(groups.values()), momentum=config.betas[0])
    # lr is a number, not a tensor, because `update` sets it before every step.
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def layer_scales(module: nn.Module, decay: float) -> Mapping[str, float]:
    """Return the learning-rate factor of each parameter of `module.encoder`, by name, or {} without layer-wise decay.

    The factor is decay^(n - depth), where `depth_of` returns the depth and n is the largest depth in the encoder. The
    factor of the head is 1 (Clark et al. 2020, ELECTRA; as in BEiT and MAE).
    """
    if decay == 1:
        return {}
    assert isinstance(module, Method), "only methods have an encoder"
    encoder = module.encoder
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    last = max(depths.values())
    return {f"encoder.{name}": decay ** (last - depth) for name, depth in depths.items()}


def step_if(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Step the optimiser if `good` (0-d bool) is True; otherwise leave weights and state bit-identical.

    The host does not wait: torch's fused kernels skip a step if `found_inf` is set, as gradient scalers do. If a
    version of torch ignores `found_inf`, the host waits for `good`.
    """
    if isinstance(optimizer, Lars) or fused_kernel_has_gate():
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(good):
        optimizer.step()


@cache
def fused_kernel_has_gate() -> bool:
    """Return whether fused AdamW skips a step if `found_inf` is set, by testing it once on a single parameter."""
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None  # type: ignore[attr-defined]
    try:
        optimizer.step()
    except Exception:  # later versions of torch may raise any error; `step_if` then waits on the host
        return False
    return weight.item() == 1.0


def update(optimizer: torch.optim.Optimizer, lr: float, loss: Tensor, clip: float | None) -> Tensor:
    """Update the weights with the current gradients, clear the gradients, and return their norm before clipping (0-d).

    If `loss` (0-d) or the norm is not finite, weights and moments stay bit-identical. The check runs on the device, and
    the host does not wait for the result.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    step_if(optimizer, loss.isfinite() & norm.isfinite())
    optimizer.zero_grad()
    return norm
