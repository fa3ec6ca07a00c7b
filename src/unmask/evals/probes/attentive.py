"""Attentive probe: a small attention layer, fitted to all frozen tokens.

An attentive probe can use information that the mean over tokens loses. One learned query attends to all tokens by
cross-attention (projected keys and values, several heads), and a linear layer maps the result to the outputs. From Chen
et al. 2022, "Context autoencoder for self-supervised representation learning", section 4.2; I-JEPA, V-JEPA and AIM are
also evaluated with attentive probes. The tokens are computed once, without augmentation, and stored in half precision.

The settings are fixed: AdamW (weight decay 0.1), batches of 256, 30 epochs but at least 300 steps, warm-up over a
twentieth of the steps, then cosine decay to 0. The learning rate is the best of 0.001, 0.003 and 0.01 on a held-out
fifth of the training images; then the probe is fitted to all training images. As in AIM but unlike Chen et al., there
is no MLP after the attention.

Letters: B batch, T tokens, D width, H heads, K outputs, n training images, m test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.data.annotations.splits import HOLD_OUT_FOR_RATE, hold_out
from unmask.evals.frozen_features import Tokens
from unmask.evals.measures import average_precision, by_column
from unmask.evals.probe_kind import Fitted, TokenProbe, TrainingTargets
from unmask.results import CLASSES, MULTILABEL

RATES = (1e-3, 3e-3, 1e-2)
RATE_WITHOUT_CHOICE = 3e-3
WEIGHT_DECAY, BATCH, EPOCHS, MIN_STEPS, WARM_UP = 0.1, 256, 30, 300, 0.05
MAX_HEADS = 12
INIT_STD = 0.02
PIECE = 1024  # images per batch in inference


class AttentiveHead(nn.Module):
    """Map (B, T, D) tokens to (B, K) outputs; for a single token, this is a linear layer.

    The query and key projections are merged into one vector per head, and values are projected after the weighted sum.
    The projections are linear, so the result is the same, at a fraction of the FLOPs. mean, std: (D,), mean and
    standard deviation by which tokens are standardised.
    """

    def __init__(self, mean: Tensor, std: Tensor, tokens: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(mean)
        self.heads = max(h for h in range(1, MAX_HEADS + 1) if width % h == 0)
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)
        self.attends = tokens > 1

        def normal(*shape: int, scale: float = INIT_STD) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        if self.attends:
            self.query = normal(self.heads, width // self.heads)
            self.key = normal(self.heads, width // self.heads, width, scale=width**-0.5)
            self.value = normal(self.heads, width // self.heads, width, scale=width**-0.5)
            self.value_bias = nn.Parameter(torch.zeros(width))
        self.weight, self.bias = normal(outputs, width), nn.Parameter(torch.zeros(outputs))

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.attends:
            return F.linear((tokens[:, 0] - self.mean) / self.std, self.weight, self.bias)
        queries = torch.einsum("hd,hdw->hw", self.query, self.key) / math.sqrt(self.query.shape[1])
        # `mean` is not subtracted here, because that would not change the softmax.
        attention = (tokens @ (queries / self.std).T).softmax(1)  # (B, T, H)
        gathered = attention.transpose(1, 2) @ tokens  # (B, H, D)
        gathered = (gathered - self.mean) / self.std
        values = torch.einsum("bhw,hdw->bhd", gathered, self.value).flatten(1) + self.value_bias
        return F.linear(values, self.weight, self.bias)


def fit_attentive(tokens: Tokens, positions: np.ndarray, targets: TrainingTargets) -> Fitted:
    """Fit a head to the tokens of the images at `positions` (n,); the targets have the order of `positions`.

    Every random choice depends only on the seed. With one image per class, none can be held out to choose the learning
    rate, so it is 0.003.
    """
    y, task, seed, device = targets.y, targets.task, targets.seed, targets.device
    goal, decode = _goal(y, task)
    strata = np.asarray(y, np.int64) if task == CLASSES else np.zeros(len(y), np.int64)
    fit, held = hold_out(strata, np.arange(len(y)), seed, HOLD_OUT_FOR_RATE)
    rate = RATE_WITHOUT_CHOICE
    if len(held):
        trials = [
            _train(tokens, positions[fit], goal=goal[fit], task=task, rate=tried, seed=seed, device=device)
            for tried in RATES
        ]
        scores = [
            _score(head, tokens, positions=positions[held], goal=goal[held], task=task, device=device)
            for head in trials
        ]
        rate = RATES[max(range(len(RATES)), key=lambda i: scores[i])]
    head = _train(tokens, positions, goal=goal, task=task, rate=rate, seed=seed, device=device)
    return Fitted(predict=lambda test: _outputs(head, test, decode), chosen={"rate": rate})


@torch.no_grad()
def _outputs(head: AttentiveHead, tokens: Tokens, decode: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """Predict the targets of test images: classes (m,) int64, or scores or quantities (m, K) float64."""
    device = head.bias.device
    pieces = torch.arange(len(tokens.values)).split(PIECE)
    return np.concatenate([decode(head(_take(tokens, piece, device)).cpu()) for piece in pieces])


def _goal(y: np.ndarray, task: str) -> tuple[Tensor, Callable[[Tensor], np.ndarray]]:
    """Return the training targets as a tensor, and the function that maps outputs of the head to predictions."""
    if task == CLASSES:
        known, place = np.unique(y, return_inverse=True)
        return torch.from_numpy(place), lambda out: known[out.argmax(1).numpy()].astype(np.int64)
    if task == MULTILABEL:
        return torch.from_numpy(y).float(), lambda out: out.double().numpy()
    middle, scale = y.mean(0), y.std(0)
    scale[scale == 0] = 1.0
    return torch.from_numpy((y - middle) / scale).float(), lambda out: out.double().numpy() * scale + middle


def _loss(out: Tensor, goal: Tensor, task: str) -> Tensor:
    if task == CLASSES:
        return F.cross_entropy(out, goal)
    return F.binary_cross_entropy_with_logits(out, goal) if task == MULTILABEL else F.mse_loss(out, goal)


def _train(
    tokens: Tokens, positions: np.ndarray, goal: Tensor, task: str, rate: float, seed: int, device: str
) -> AttentiveHead:
    generator = torch.Generator().manual_seed(seed)
    outputs = int(goal.max()) + 1 if task == CLASSES else goal.shape[1]
    where = torch.from_numpy(np.asarray(positions, np.int64))
    head = AttentiveHead(*_statistics(tokens, where), tokens.values.shape[1], outputs, generator).to(device)
    goal = goal.to(device)
    batch = min(BATCH, len(where))
    steps = max(MIN_STEPS, EPOCHS * math.ceil(len(where) / batch))
    matrices = [p for p in head.parameters() if p.ndim > 1]
    rest = [p for p in head.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    for step, chosen in zip(range(steps), _batches(len(where), batch, generator), strict=False):
        progress = (step + 1) / steps
        share = min(progress / WARM_UP, 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        loss = _loss(head(_take(tokens, where[chosen], device)), goal[chosen.to(device)], task)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.requires_grad_(False)


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of indices below `count`, shuffled every epoch; an incomplete last batch is dropped."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def _statistics(tokens: Tokens, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation (D,) of all tokens of the images at `positions`."""
    count, total, square = 0, 0.0, 0.0
    for part in positions.split(PIECE):
        flat = tokens.values[part].double().flatten(0, 1)
        count, total, square = count + len(flat), total + flat.sum(0), square + flat.square().sum(0)
    mean = torch.as_tensor(total) / count
    std = (torch.as_tensor(square) / count - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0
    return mean.float() * tokens.scale + tokens.middle, std.float() * tokens.scale


def _take(tokens: Tokens, positions: Tensor, device: str | torch.device) -> Tensor:
    """Return the tokens of the images at `positions`, (B, T, D) float32."""
    values = tokens.values[positions].to(device).float()
    return values * tokens.scale.to(device) + tokens.middle.to(device)


@torch.no_grad()
def _score(
    head: AttentiveHead, tokens: Tokens, positions: np.ndarray, goal: Tensor, task: str, device: str
) -> tuple[float, float]:
    """Return the score of a head on held-out images, larger is better: (metric of the task, negative loss)."""
    where = torch.from_numpy(np.asarray(positions, np.int64))
    out = torch.cat([head(_take(tokens, part, device)).cpu() for part in where.split(PIECE)])
    loss = -float(_loss(out, goal, task))
    if task == CLASSES:
        return float((out.argmax(1) == goal).float().mean()), loss
    if task == MULTILABEL:
        precision = by_column(average_precision, goal.double().numpy(), out.double().numpy())
        return (-1.0 if np.isnan(precision).all() else float(np.nanmean(precision))), loss
    return loss, loss


def _protocol(task: str) -> str:
    return (
        f"one learned query that attends to all tokens and a linear head (AdamW, batch {BATCH}, {EPOCHS} epochs but at "
        f"least {MIN_STEPS} steps, learning rate chosen on a fifth of the training images)"
    )


PROBE = TokenProbe(
    title="Attentive probe",
    phrase="an attentive probe",
    pool="attentive",
    pool_title="attention over tokens",
    protocol=_protocol,
    fit=fit_attentive,
)
