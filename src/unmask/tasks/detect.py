"""Object detection with ViTDet's feature pyramid (Li et al. 2022) and an FCOS head (Tian et al. 2019, 2020).

There are no anchors, no proposals and no second stage.

Every cell of every level of the pyramid predicts the probability of each class, the distances from its centre to the
four sides of a box, and its centreness (1 in the middle of the box). A cell is assigned to a box if its centre lies in
the box and within 1.5 cells of the middle of the box, and if the distance from its centre to the farthest side is in
the range of its level: at most 8 cells, and more than the range of the next finer level. The finest level is assigned
all smaller boxes, the coarsest all larger ones. A long, thin box without such a cell is assigned to the cells of any
level near its middle. If several boxes match a cell, it is assigned to the smallest. All other cells are background; a
box so small that it contains no cell centre is not learnt. The encoder's weights come from another Run.

Loss: focal loss of the classes (Lin et al. 2017, alpha 0.25, gamma 2) divided by the number of cells with a box; 1 -
GIoU of the boxes, averaged with the true centreness as weight; cross-entropy of the centreness. Shapes are fixed (boxes
are padded), so there is no synchronisation with the device.

Differs from FCOS: LayerNorm over channels instead of GroupNorm; distances are in cells of the level; long, thin boxes,
which FCOS ignores, are learnt. Differs from ViTDet: the head is FCOS's instead of Mask R-CNN's; attention is global in
every block, without windows; there is no large-scale jitter. The number of cells with a box is counted per micro-batch.
Layer-wise decay of the learning rate is a setting of the optimiser (`optim.py`).

See `data/annotations/` for reading boxes from files, `finetuning/finetune_run.py` for length and data of the training,
and `metrics/average_precision.py` for the metric.

Letters: L cells of all levels together, K classes, M boxes per image after padding, W width of the pyramid and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.data.annotations.box_annotations import BoxAnnotations
from unmask.errors import UserError
from unmask.method import Clock, Loss, Picture
from unmask.metrics.average_precision import ImageBoxes, average_precision, true_boxes
from unmask.metrics.measurement import Measurement, Metric
from unmask.nn.batch_sums import mean_count
from unmask.nn.blocks import draw_paths
from unmask.nn.boxes import area, clip, giou, outline, suppress
from unmask.nn.freeze import freeze
from unmask.nn.inputs import Scale
from unmask.nn.patches import grid_of
from unmask.nn.pyramid import ChannelNorm, Pyramid
from unmask.nn.vit import ViT
from unmask.rng import Stream
from unmask.task import PartialTaskConfig, Task

ALPHA, GAMMA = 0.25, 2.0  # Parameters of the focal loss.
PRIOR = 0.01  # Initial class score: nearly all cells are background.
RADIUS = 1.5  # Greatest distance of an assigned cell from the middle of its box, in cells.
REACH = 8.0  # Greatest distance, in cells, to the farthest side of a box.
LARGEST = 8.0  # Greatest logarithm of a distance in cells (about 3000 cells), to keep it finite.
LEAST_SCORE, OVERLAP, NUM_BEFORE, NUM_FOUND = 0.05, 0.6, 1000, 100  # All four values are those of FCOS.
DRAWN_SCORE = 0.4
COLOURS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))


class Config(PartialTaskConfig):
    """Settings of the detector.

    classes: names, in the order of the labels. width: channels of pyramid and head. convs: convolutions in each of the
    head's two branches.

    last_blocks: how many of the encoder's last blocks are trained with the head (None: the whole encoder). 0 trains
    only pyramid and head, 0.5 also the MLP of the last block. drop_path: stochastic depth, the probability of skipping
    the last block (ViTDet: 0.1 for ViT-B, 0.4 for ViT-L).
    """

    name: Literal["detect"] = "detect"
    classes: tuple[str, ...] = Field(min_length=1)
    width: int = Field(default=256, gt=0)
    convs: int = Field(default=4, ge=0)
    drop_path: float = Field(default=0.0, ge=0, lt=1)


class Cells(NamedTuple):
    """All cells of all levels of the pyramid, finest level first, each level row by row. `centre` and `stride` are (x,
    y) in pixels.

    `reach`: least and greatest distance, in cells, to the farthest side of an assigned box.
    """

    centre: Float[Tensor, "L 2"]
    stride: Float[Tensor, "L 2"]
    reach: Float[Tensor, "L 2"]


class Guess(NamedTuple):
    """Predictions of all cells: class and centreness as logits, and distances left, up, right and down in cells."""

    classes: Float[Tensor, "B L K"]
    sides: Float[Tensor, "B L 4"]
    centreness: Float[Tensor, "B L"]


class Truth(NamedTuple):
    """Targets of every cell: `label` is -1 for background, where `sides` are 1 and `centreness` is 0."""

    label: Int[Tensor, "B L"]
    sides: Float[Tensor, "B L 4"]
    centreness: Float[Tensor, "B L"]


class Found(NamedTuple):
    """Detections of one image, best first. `boxes` are (x1, y1, x2, y2) in pixels of the image, `scores` 0 to 1."""

    boxes: Float[Tensor, "k 4"]
    scores: Float[Tensor, " k"]
    labels: Int[Tensor, " k"]

    def resized(self, seen: tuple[int, int], size: tuple[int, int]) -> Found:
        """Rescale boxes from the size (H, W) that the model saw to another size; the result is float64 on the host."""
        scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2, dtype=torch.float64)
        return Found(self.boxes.float().cpu().double() * scale, self.scores.float().cpu(), self.labels.cpu())


class Head(nn.Module):
    """Head shared by all levels: two branches of 3x3 convolutions, one for classes, one for sides and centreness."""

    def __init__(self, width: int, convs: int, classes: int, levels: int) -> None:
        super().__init__()
        self.class_branch, self.side_branch = branch(width, convs), branch(width, convs)
        self.to_classes = nn.Conv2d(width, classes, 3, padding=1)
        self.to_sides = nn.Conv2d(width, 4, 3, padding=1)
        self.to_centreness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.01)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.constant_(self.to_classes.bias, -log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, maps: list[Float[Tensor, "B W _ _"]]) -> Guess:
        levels = []
        for x, scale in zip(maps, self.scales, strict=True):
            about_class, about_side = self.class_branch(x), self.side_branch(x)
            parts = self.to_classes(about_class), self.to_sides(about_side), self.to_centreness(about_side)
            classes, sides, centreness = (part.flatten(2).transpose(1, 2).float() for part in parts)
            levels.append((classes, (scale * sides).clamp(max=LARGEST).exp(), centreness[..., 0]))
        return Guess(*(torch.cat(part, 1) for part in zip(*levels, strict=True)))


def branch(width: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), ChannelNorm(width), nn.ReLU()]
    return nn.Sequential(*layers)


class Detector(Task[Found, BoxAnnotations]):
    """See the module docstring. Accepts images of sizes other than in training, in whole patches."""

    annotation = "boxes"
    headline = (Metric("ap50", "AP50"), Metric("ap", "AP"))
    title = "detection"
    needs = "boxes"
    recipe = "detect"
    head_name = "the feature pyramid and its head"
    undecayed = ("encoder.cls_token", "encoder.pos_embed")

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.drop_path, self.classes = config.drop_path, config.classes
        self.encoder = ViT(config.encoder, images)
        self.pyramid = Pyramid(self.encoder.width, config.width, self.encoder.patch, self.encoder.grid)
        self.head = Head(config.width, config.convs, len(config.classes), len(self.pyramid.strides))
        freeze(self.encoder, config.last_blocks)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return focal loss + GIoU loss + centreness loss, and log each. Raises UserError without boxes.

        Images without objects are allowed: all their cells are background.
        """
        boxes, labels = require_boxes(batch)
        paths = None
        if self.drop_path:
            paths = draw_paths(clock.rng.uniform(2 * len(self.encoder.blocks), Stream.PATHS), self.drop_path)
        guess, cells = self.guess(batch.images, paths)
        return error(guess, assign(cells, boxes, labels))

    def guess(
        self, images: Shaped[Tensor, "B C H W"], paths: Float[Tensor, "depth 2 B 1 1"] | None = None
    ) -> tuple[Guess, Cells]:
        """Return predictions for images in the files' units, and the cells. paths: see `draw_paths`."""
        grid = grid_of((images.shape[2], images.shape[3]), self.encoder.patch)
        tokens = self.encoder.embed(self.encoder.patches(images), grid=grid)
        *_, last = self.encoder.layers(tokens, grid=grid, paths=paths)
        maps = self.pyramid(last[:, 1:].transpose(1, 2).unflatten(2, grid))
        return self.head(maps), make_cells(self.pyramid.strides, [x.shape[2:] for x in maps], images.device)

    @torch.no_grad()
    def predict(
        self,
        images: Shaped[Tensor, "B C H W"],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        scale: Scale | None = None,
    ) -> list[Found]:
        """Find at most 100 objects in each image; see `Task.predict`.

        The score of an object is the square root of class probability times centreness; scores below 0.05 are dropped.
        """
        images = self.encoder.accept(images, scale)
        guess, cells = self.guess(images)
        seen = (images.shape[2], images.shape[3])
        found = [select(Guess(*one), cells, seen) for one in zip(*guess, strict=True)]
        return found if sizes is None else [one.resized(seen, size) for one, size in zip(found, sizes, strict=True)]

    def measure(self, batches: Iterable[Batch], truth: BoxAnnotations) -> Measurement:
        """Measure COCO's average precision at the size of the files. Raises UserError without pycocotools or boxes."""
        true, found = [], []
        for batch in batches:
            rows = batch.index.tolist()
            true += [true_boxes(truth, row) for row in rows]
            found += [
                ImageBoxes(one.boxes.numpy(), one.labels.numpy(), one.scores.numpy())
                for one in self.predict(batch.images.to(self.device), [truth.sizes[row] for row in rows])
            ]
        precision = average_precision(true, found, self.classes)
        values = {"ap": precision.ap, "ap50": precision.ap50, "ap75": precision.ap75}
        return Measurement(values, images=len(true), by_class=precision.classes)

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw original, true boxes, and confident detections, with one colour for each class."""
        boxes, labels = require_boxes(batch)
        guess, cells = self.guess(batch.images)
        truth, size = assign(cells, boxes, labels), (batch.images.shape[2], batch.images.shape[3])
        found = [select(Guess(*one), cells, size) for one in zip(*guess, strict=True)]
        sure = [(one.boxes[s], one.labels[s]) for one in found for s in [one.scores > DRAWN_SCORE]]
        true = [(b[y >= 0], y[y >= 0]) for b, y in zip(boxes, labels, strict=True)]
        images = batch.images.float()
        panels = {"original": images, "true boxes": self.draw(images, true), "found boxes": self.draw(images, sure)}
        return Picture(
            panels,
            f"{sum(len(y) for _, y in true)} true boxes; {sum(len(y) for _, y in sure)} boxes found with a score above "
            f"{DRAWN_SCORE}. Each class has its own colour.",
            {"loss": error(guess, truth).value, "same_everywhere": same_everywhere(truth, guess.classes.shape[2])},
        )

    def draw(
        self, images: Float[Tensor, "B C H W"], boxes: list[tuple[Float[Tensor, "_ 4"], Int[Tensor, " _"]]]
    ) -> Float[Tensor, "B C H W"]:
        """Outline boxes on the images in the colours of their labels, scaled to the images' range of values."""
        spec = self.encoder.spec
        low, high = (images.new_tensor(value) for value in spec.value_range)
        on = [[colour[c % 3] if spec.channels > 1 else 1 for c in range(spec.channels)] for colour in COLOURS]
        palette = low + images.new_tensor(on) * (high - low)
        return torch.stack([outline(x, b, palette[y % len(palette)]) for x, (b, y) in zip(images, boxes, strict=True)])


def make_cells(strides: tuple[tuple[float, float], ...], shapes: list[torch.Size], device: torch.device) -> Cells:
    """Return the cells of levels with these strides, (height, width) in pixels, and shapes (rows, cols)."""
    centres, sizes, reaches = [], [], []
    for number, ((high, wide), (rows, cols)) in enumerate(zip(strides, shapes, strict=True)):
        y, x = ((torch.arange(n, device=device) + 0.5) * step for n, step in ((rows, high), (cols, wide)))
        centres.append(torch.stack([x.repeat(rows), y.repeat_interleave(cols)], 1))
        # The cells of the next finer level are half as large, so its range ends at half of this level's range.
        pairs = (wide, high), (REACH / 2 if number else 0.0, REACH if number < len(strides) - 1 else float("inf"))
        for into, (first, second) in zip((sizes, reaches), pairs, strict=True):
            value = torch.full((rows * cols, 2), float(first), device=device)
            value[:, 1] = second
            into.append(value)
    return Cells(torch.cat(centres), torch.cat(sizes), torch.cat(reaches))


def assign(cells: Cells, boxes: Float[Tensor, "B M 4"], labels: Int[Tensor, "B M"]) -> Truth:
    """Assign boxes to cells, as the module docstring describes, and return the targets."""
    if boxes.shape[1] == 0:
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
    each = [assign_one(cells, *one) for one in zip(boxes, labels, strict=True)]
    return Truth(*(torch.stack(part) for part in zip(*each, strict=True)))


def assign_one(cells: Cells, boxes: Float[Tensor, "M 4"], labels: Int[Tensor, " M"]) -> Truth:
    """Assign the boxes of one image, so that only L x M distances are in memory; the result has no batch dimension."""
    sides = sides_from(cells, boxes)  # (L, M, 4), in cells
    off_middle = (sides[..., :2] - sides[..., 2:]).abs().amax(2) / 2
    farthest = sides.amax(2)
    near = (sides.amin(2) > 0) & (off_middle < RADIUS) & (labels >= 0)
    matches = near & (farthest > cells.reach[:, :1]) & (farthest <= cells.reach[:, 1:])
    matches |= near & ~matches.any(0)
    least, which = area(boxes).expand(len(sides), -1).masked_fill(~matches, float("inf")).min(1)
    assigned = least.isfinite()
    chosen = sides.gather(1, which[:, None, None].expand(-1, 1, 4))[:, 0]
    chosen = torch.where(assigned[:, None], chosen, 1.0)
    pairs = torch.stack([chosen[:, :2], chosen[:, 2:]], 1)  # (L, opposite, axis)
    centreness = (pairs.amin(1) / pairs.amax(1)).prod(1).sqrt()
    return Truth(torch.where(assigned, labels[which], -1), chosen, torch.where(assigned, centreness, 0.0))


def sides_from(cells: Cells, boxes: Float[Tensor, "M 4"]) -> Float[Tensor, "L M 4"]:
    """Return distances from cell centres to the left, upper, right and lower sides of boxes, in cells; < 0 outside."""
    centre, stride = cells.centre[:, None], cells.stride[:, None]
    return torch.cat([(centre - boxes[:, :2]) / stride, (boxes[:, 2:] - centre) / stride], 2)


def around(sides: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Return the boxes with these distances to their sides, relative to the cell's centre, in cells."""
    return torch.cat([-sides[..., :2], sides[..., 2:]], -1)


def error(guess: Guess, truth: Truth) -> Loss:
    """Return the loss described in the module docstring, and log its three parts."""
    assigned = (truth.label >= 0).float()
    count = mean_count(assigned.sum(), least=1.0)
    right = truth.label[..., None] == torch.arange(guess.classes.shape[2], device=truth.label.device)
    classes = focal(guess.classes, right.float()).sum() / count
    off = (1 - giou(around(guess.sides), around(truth.sides))) * truth.centreness
    sides = off.sum() / mean_count(truth.centreness.sum(), least=1e-6)
    off_centre = F.binary_cross_entropy_with_logits(guess.centreness, truth.centreness, reduction="none") * assigned
    centreness = off_centre.sum() / count
    logs = {"classes": classes.detach(), "boxes": sides.detach(), "centreness": centreness.detach()}
    return Loss(classes + sides + centreness, logs)


def focal(logits: Float[Tensor, "*n"], truth: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Focal loss: binary cross-entropy times alpha and (1 - p of the true class)^2, to down-weight easy cells."""
    p = logits.sigmoid()
    wrong = p * (1 - truth) + (1 - p) * truth
    weight = ALPHA * truth + (1 - ALPHA) * (1 - truth)
    return weight * wrong**GAMMA * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def same_everywhere(truth: Truth, num_classes: int) -> Float[Tensor, ""]:
    """Return the loss of a baseline that makes the same prediction for every cell of every image.

    The baseline predicts the best constant class scores, and the mean sides and centreness of the cells of `truth`.
    """
    assigned, device = (truth.label >= 0).float(), truth.label.device
    count = assigned.sum().clamp(min=1)
    logits = torch.linspace(-12, 12, 241, device=device)
    right = (truth.label[..., None] == torch.arange(num_classes, device=device)).flatten(0, 1).sum(0)[:, None]  # (K, 1)
    one, none = torch.ones_like(logits), torch.zeros_like(logits)
    costs = right * focal(logits, one) + (truth.label.numel() - right) * focal(logits, none)  # (K, 241)
    sides = (truth.sides * assigned[..., None]).sum((0, 1)) / count
    centreness = (truth.centreness.sum() / count).clamp(1e-6, 1 - 1e-6).logit()
    shape = truth.label.shape
    alike = Guess(
        logits[costs.argmin(1)].expand(*shape, -1), sides.expand(*shape, 4).clamp(min=1e-6), centreness.expand(shape)
    )
    return error(alike, truth).value


def select(guess: Guess, cells: Cells, size: tuple[int, int]) -> Found:
    """Select the best boxes of one image of (H, W) pixels, without duplicates. `guess` has no batch dimension."""
    scores = (guess.classes.sigmoid() * guess.centreness.sigmoid()[:, None]).sqrt().flatten()
    scores, where = scores.topk(min(NUM_BEFORE, len(scores)))
    where, scores = where[scores > LEAST_SCORE], scores[scores > LEAST_SCORE]
    cell, label = where // guess.classes.shape[1], where % guess.classes.shape[1]
    boxes = cells.centre[cell].repeat(1, 2) + around(guess.sides[cell]) * cells.stride[cell].repeat(1, 2)
    boxes = clip(boxes, size)
    kept = suppress(boxes, scores, label, OVERLAP)[:NUM_FOUND]
    return Found(boxes[kept], scores[kept], label[kept])


def require_boxes(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return boxes (B, M, 4) in pixels and their labels (B, M). Raises UserError for images without boxes."""
    if batch.boxes is None or batch.box_labels is None:
        raise UserError(
            "got images without boxes, which a detector is trained on; pass the file of boxes (COCO's JSON, or VOC's "
            "XML) with --annotations; images without objects are allowed"
        )
    return batch.boxes, batch.box_labels
