"""Attentive probe: what a small attention layer can read out of the frozen tokens, where their mean may hide it.

One learned query looks at all tokens by cross-attention (keys and values projected, several heads), and a linear map
reads what it gathers. From Chen et al. 2022, "Context autoencoder for self-supervised representation learning", section
4.2; used since for I-JEPA, V-JEPA and AIM, whose features lie in the patch tokens. The encoder stays frozen and the
tokens are as they were without augmentation: computed once, kept in half precision.

The recipe is fixed: AdamW (weight decay 0.1), batches of 256, 30 epochs but at least 300 steps, cosine decay to 0 after
a twentieth of warm-up; the learning rate is that of 0.001, 0.003 and 0.01 which is best on a fifth of the training
images, and then all of them are fitted. Differs from the paper: no transformer MLP after the attention, as in AIM.

Letters: B batch, T tokens, D width, H heads, K outputs, n training images, m test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.data.annotations.label_tables import CLASSES, MULTILABEL
from unmask.data.annotations.splits import HOLD_OUT_FOR_RATE, hold_out
from unmask.evals.frozen_features import Tokens
from unmask.evals.measures import average_precision, by_column

ATTENTIVE = "attentive"  # the kind of probe, by name
RATES = (1e-3, 3e-3, 1e-2)
RATE_WITHOUT_CHOICE = 3e-3
WEIGHT_DECAY, BATCH, EPOCHS, LEAST_STEPS, WARM_UP = 0.1, 256, 30, 300, 0.05
MOST_HEADS = 12
INIT_STD = 0.02
PIECE = 1024  # images at a time when nothing is learnt


class AttentiveHead(nn.Module):
    """(B, T, D) tokens -> (B, K). With one token there is nothing to choose: a linear head on it.

    Query and keys act on a token as one vector for each head, and values are projected after the weighted sum, which is
    the same because both are linear, and several times cheaper. `middle` and `spread` (D,) standardise the tokens.
    """

    def __init__(self, middle: Tensor, spread: Tensor, tokens: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(middle)
        self.heads = max(h for h in range(1, MOST_HEADS + 1) if width % h == 0)
        self.middle, self.spread = nn.Buffer(middle), nn.Buffer(spread)
        self.attends = tokens > 1

        def drawn(*shape: int, std: float = INIT_STD) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(*shape, generator=generator))

        if self.attends:
            self.query = drawn(self.heads, width // self.heads)
            self.key = drawn(self.heads, width // self.heads, width, std=width**-0.5)
            self.value = drawn(self.heads, width // self.heads, width, std=width**-0.5)
            self.value_bias = nn.Parameter(torch.zeros(width))
        self.weight, self.bias = drawn(outputs, width), nn.Parameter(torch.zeros(outputs))

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.attends:
            return F.linear((tokens[:, 0] - self.middle) / self.spread, self.weight, self.bias)
        looks = torch.einsum("hd,hdw->hw", self.query, self.key) / math.sqrt(self.query.shape[1])
        attention = (tokens @ (looks / self.spread).T).softmax(1)  # (B, T, H); `middle` would move all tokens alike
        gathered = attention.transpose(1, 2) @ tokens  # (B, H, D)
        gathered = (gathered - self.middle) / self.spread
        values = torch.einsum("bhw,hdw->bhd", gathered, self.value).flatten(1) + self.value_bias
        return F.linear(values, self.weight, self.bias)


@dataclass(frozen=True)
class AttentiveFit:
    """A fitted head. `rate` is the learning rate; `chosen` is False where too few labels were given to choose it."""

    head: AttentiveHead
    answer: Callable[[Tensor], np.ndarray]
    rate: float
    chosen: bool

    @torch.no_grad()
    def predict(self, tokens: Tokens) -> np.ndarray:
        """Classes (m,) int64, or scores or quantities (m, K) float64."""
        device = self.head.bias.device
        places = torch.arange(len(tokens.values)).split(PIECE)
        return np.concatenate([self.answer(self.head(_take(tokens, place, device)).cpu()) for place in places])


def fit_attentive(
    tokens: Tokens, places: np.ndarray, y: np.ndarray, *, task: str, seed: int = 0, device: str = "cpu"
) -> AttentiveFit:
    """Fit on the images at `places` (n,) of `tokens`: `y` (n,) classes, or (n, K) of 0 and 1, or (n, K) quantities.

    Everything that is drawn depends on `seed`. With one image per class the learning rate is 0.003, unchosen.
    """
    goal, answer = _goal(y, task)
    strata = np.asarray(y, np.int64) if task == CLASSES else np.zeros(len(y), np.int64)
    fit, held = hold_out(strata, np.arange(len(y)), seed, HOLD_OUT_FOR_RATE)
    rate = RATE_WITHOUT_CHOICE
    if len(held):
        trials = [_train(tokens, places[fit], goal[fit], task, tried, seed, device) for tried in RATES]
        scores = [_score(head, tokens, places[held], goal[held], task, device) for head in trials]
        rate = RATES[max(range(len(RATES)), key=lambda i: scores[i])]
    head = _train(tokens, places, goal, task, rate, seed, device)
    return AttentiveFit(head, answer, rate, len(held) > 0)


def _goal(y: np.ndarray, task: str) -> tuple[Tensor, Callable[[Tensor], np.ndarray]]:
    """What the head is fitted to, and what its outputs (m, K) mean."""
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
    tokens: Tokens, places: np.ndarray, goal: Tensor, task: str, rate: float, seed: int, device: str
) -> AttentiveHead:
    generator = torch.Generator().manual_seed(seed)
    outputs = int(goal.max()) + 1 if task == CLASSES else goal.shape[1]
    where = torch.from_numpy(np.asarray(places, np.int64))
    head = AttentiveHead(*_spread(tokens, where), tokens.values.shape[1], outputs, generator).to(device)
    goal = goal.to(device)
    batch = min(BATCH, len(where))
    steps = max(LEAST_STEPS, EPOCHS * math.ceil(len(where) / batch))
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
    """Places, in a new order every epoch; what does not fill a batch waits for another epoch."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def _spread(tokens: Tokens, places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) over all tokens of these images."""
    count, total, square = 0, 0.0, 0.0
    for part in places.split(PIECE):
        flat = tokens.values[part].double().flatten(0, 1)
        count, total, square = count + len(flat), total + flat.sum(0), square + flat.square().sum(0)
    mean = torch.as_tensor(total) / count
    std = (torch.as_tensor(square) / count - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0
    return mean.float() * tokens.scale + tokens.middle, std.float() * tokens.scale


def _take(tokens: Tokens, places: Tensor, device: str | torch.device) -> Tensor:
    """(B, T, D) float32 tokens of these images."""
    values = tokens.values[places].to(device).float()
    return values * tokens.scale.to(device) + tokens.middle.to(device)


@torch.no_grad()
def _score(
    head: AttentiveHead, tokens: Tokens, places: np.ndarray, goal: Tensor, task: str, device: str
) -> tuple[float, float]:
    """How good a head is on held-out images, the larger the better: the measure of the task, then the loss."""
    where = torch.from_numpy(np.asarray(places, np.int64))
    out = torch.cat([head(_take(tokens, part, device)).cpu() for part in where.split(PIECE)])
    loss = -float(_loss(out, goal, task))
    if task == CLASSES:
        return float((out.argmax(1) == goal).float().mean()), loss
    if task == MULTILABEL:
        precision = by_column(average_precision, goal.double().numpy(), out.double().numpy())
        return (-1.0 if np.isnan(precision).all() else float(np.nanmean(precision))), loss
    return loss, loss
