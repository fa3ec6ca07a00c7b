"""Semantic segmentation, a class for every pixel, with a linear layer or UPerNet on the encoder (`nn/map_heads.py`).

As in MAE and BEiT on ADE20K (He et al. 2021, A.4), the whole encoder, including positions, is trained with the head,
with stochastic depth and layer-wise decay of the learning rate (`optim.py`). The loss is the cross-entropy of all
pixels that are not IGNORED, at the resolution of the images: scores are resized bilinearly before the softmax. The
encoder's weights come from another Run, or are random for training from scratch.

Differs from the paper: no auxiliary head; a relative position bias only if the encoder was pre-trained with one; a
single image scale; the differences of UPerNet are in `map_heads.py`. The encoder's final norm is not used, as in
`classify.py`.

See `data/annotations/segmentation_masks.py` for reading masks, `finetuning/finetune_run.py` for length and data of the
training, and `metrics/mean_iou.py` for the metric.

Letters: B images, C channels, H x W pixels, K classes, L blocks.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor

from unmask.batch import IGNORED, Batch, ImageSpec
from unmask.data.annotations.segmentation_masks import SegmentationMasks
from unmask.errors import UserError
from unmask.method import Clock, Loss, Picture
from unmask.metrics import mean_iou
from unmask.metrics.measurement import Measurement, Metric
from unmask.nn.batch_sums import mean_count
from unmask.nn.blocks import draw_paths
from unmask.nn.freeze import freeze
from unmask.nn.inputs import Scale
from unmask.nn.map_heads import LinearHead, UPerNet, resize
from unmask.nn.patches import grid_of
from unmask.nn.vit import ViT
from unmask.rng import Stream
from unmask.task import MaskTaskConfig, PartialTaskConfig, Task

COLOURS = {  # colours of the first classes, as distinct as possible
    "red": (230, 25, 75), "green": (60, 180, 75), "yellow": (255, 225, 25), "blue": (0, 90, 220),
    "orange": (245, 130, 48), "purple": (145, 30, 180), "cyan": (70, 240, 240), "pink": (250, 150, 200),
    "lime": (190, 245, 60), "brown": (150, 95, 35), "teal": (0, 130, 130), "white": (255, 255, 255),
}  # fmt: skip
TURN = 0.618034  # difference of hue of successive classes after COLOURS: with the golden ratio no hue repeats


class Config(PartialTaskConfig, MaskTaskConfig):
    """Settings of the segmenter.

    classes: names, in the order of the numbers in `Batch.maps`. ignored: ids in the mask files that are not classes,
    stored so that other masks are read in the same way. values: the id of each class in the mask files (None: all ids
    that are not ignored are classes). stored_pixels: whether masks belong to the stored pixels of images with an EXIF
    orientation. head: "upernet", with `width` channels, or "linear", which has no width. last_blocks: how many of the
    encoder's last blocks are trained with the head (None: the whole encoder). 0 trains only the head, 0.5 also the MLP
    of the last block. drop_path: stochastic depth, the probability of skipping the last block. feature_blocks: the
    blocks that UPerNet reads: "beit" for those of BEiT's code (4, 6, 8 and 12 of 12; 8, 12, 16 and 24 of 24), used by
    the recipes, "even" for evenly spaced ones (3, 6, 9, 12), used by older runs without this setting.
    """

    name: Literal["segment"] = "segment"
    classes: tuple[str, ...] = Field(min_length=2, max_length=IGNORED - 1)
    head: Literal["upernet", "linear"] = "upernet"
    width: int = Field(default=256, gt=0)
    feature_blocks: Literal["beit", "even"] = "even"
    drop_path: float = Field(default=0.0, ge=0, lt=1)

    @classmethod
    def refusal(cls, asked: Mapping[str, Any]) -> str | None:
        if asked.get("method.head") == "linear" and "method.width" in asked:
            return "got method.width with method.head=linear, which has no width; leave one of them out"
        return super().refusal(asked)


class Segmenter(Task[Tensor, SegmentationMasks]):
    """See the module docstring. Accepts images of sizes other than in training, in whole patches.

    A prediction is (H, W) int64, the class of each pixel.
    """

    annotation = "masks"
    headline = (Metric("mean_iou", "mean IoU"), Metric("pixel_accuracy", "pixel accuracy"))
    title = "segmentation"
    needs = "segmentation masks"
    recipe = "segment"
    head_name = "the segmentation head"
    undecayed = ("encoder.cls_token", "encoder.pos_embed")

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.encoder = ViT(config.encoder, images)
        width, count = self.encoder.width, len(config.classes)
        if config.head == "linear":
            self.head: LinearHead | UPerNet = LinearHead(width, count)
        else:
            patch, grid = self.encoder.patch, self.encoder.grid
            self.head = UPerNet(width, config.width, count, patch, grid, config.feature_blocks)
        freeze(self.encoder, config.last_blocks)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the mean cross-entropy of the annotated pixels, 0 if there are none; log the pixel accuracy.

        Raises UserError for images without masks.
        """
        maps, paths = require_maps(batch), None
        if self.config.drop_path:
            draws = clock.rng.uniform(2 * len(self.encoder.blocks), Stream.PATHS)
            paths = draw_paths(draws, self.config.drop_path)
        logits = self._scores(batch.images, paths)
        return Loss(error(logits, maps), {"pixel_accuracy": right_share(logits.detach().argmax(1), maps)})

    def logits(self, images: Shaped[Tensor, "B C H W"], scale: Scale | None = None) -> Float[Tensor, "B K H W"]:
        """Return class scores for each pixel of images in the files' units. scale: see `ImageEncoder.accept`."""
        return self._scores(self.encoder.accept(images, scale))

    def _scores(
        self, images: Shaped[Tensor, "B C H W"], paths: Float[Tensor, "L 2 B 1 1"] | None = None
    ) -> Float[Tensor, "B K H W"]:
        """Return the scores of `logits` without its checks, for training. paths: see `draw_paths`."""
        size = (images.shape[2], images.shape[3])
        grid = grid_of(size, self.encoder.patch)
        blocks, maps = self.head.blocks(len(self.encoder.blocks)), []
        tokens = self.encoder.embed(self.encoder.patches(images), grid=grid)
        for number, x in enumerate(self.encoder.layers(tokens, grid=grid, paths=paths)):
            maps += [x[:, 1:].transpose(1, 2).unflatten(2, grid)] * blocks.count(number)  # (B, D, R, C)
        return resize(self.head(maps).float(), size)

    @torch.no_grad()
    def predict(
        self,
        images: Shaped[Tensor, "B C H W"],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        scale: Scale | None = None,
    ) -> list[Int[Tensor, "_ _"]]:
        logits = self.logits(images, scale)
        if sizes is None:
            return list(logits.argmax(1))
        return [mean_iou.classes_at(one, size) for one, size in zip(logits, sizes, strict=True)]

    def measure(self, batches: Iterable[Batch], truth: SegmentationMasks) -> Measurement:
        """Measure mean intersection over union at the size of each file, with a bootstrap interval over the images.

        Raises UserError if all pixels are ignored.
        """
        return mean_iou.measure(self.logits, batches, truth.read, self.classes, device=self.device).as_measurement()

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw original, true mask and predicted mask, a colour for each class; ignored pixels are black."""
        maps, logits = require_maps(batch), self.logits(batch.images)
        guess = logits.argmax(1)
        panels = {
            "original": batch.images.float(),
            "true map": self.draw(maps),
            "predicted map": self.draw(torch.where(maps == IGNORED, maps, guess)),
        }
        present = [int(one) for one in maps.unique() if int(one) != IGNORED]
        named = [f"{colour} is {self.config.classes[one]}" for one, colour in enumerate(COLOURS) if one in present]
        legend = f" Here {', '.join(named)}." if self.encoder.spec.channels == 3 and named else ""
        shares = torch.stack([(maps == one).sum() for one in present] or [maps.new_ones(())])
        shares = shares / shares.sum()
        return Picture(
            panels,
            f"{float(right_share(guess, maps)):.1%} of the annotated pixels are classified correctly.{legend}",
            {
                "loss": error(logits, maps),
                "all_classes_alike": logits.new_tensor(log(logits.shape[1])),
                "shares_of_classes": -(shares * shares.log()).sum(),
            },
        )

    def draw(self, maps: Int[Tensor, "B H W"]) -> Float[Tensor, "B C H W"]:
        """Draw masks in colour, in the files' units; in shades of gray unless images have three channels."""
        spec, count = self.encoder.spec, len(self.config.classes)
        if spec.channels == 3:
            table = colour_table(count)
        else:
            table = (torch.arange(1, count + 1) / count)[:, None].expand(count, spec.channels)
        table = torch.cat([table, table.new_zeros(1, spec.channels)]).to(
            maps.device
        )  # the last colour is for ignored pixels
        low, high = (torch.tensor(value, device=maps.device) for value in spec.value_range)
        drawn = table[torch.where(maps == IGNORED, count, maps)]  # (B, H, W, C)
        return (low + drawn * (high - low)).movedim(3, 1)


def colour_table(count: int) -> Float[Tensor, "K 3"]:
    """Return fixed colours of the classes, 0 to 1: first COLOURS, then evenly distributed hues."""
    known = [tuple(value / 255 for value in colour) for colour in COLOURS.values()]
    more = [colorsys.hsv_to_rgb(i * TURN % 1, 0.35 + 0.3 * (i % 3), 0.95 - 0.2 * (i % 4)) for i in range(count)]
    return torch.tensor([*known, *more][:count])


def error(logits: Float[Tensor, "B K H W"], maps: Int[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the annotated pixels, 0 if there are none."""
    counted = mean_count((maps != IGNORED).sum(), least=1.0)
    return F.cross_entropy(logits, maps, ignore_index=IGNORED, reduction="sum") / counted


def right_share(guess: Int[Tensor, "B H W"], maps: Int[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Return the share of the annotated pixels whose class is correct."""
    return (guess == maps).sum() / mean_count((maps != IGNORED).sum(), least=1.0)


def require_maps(batch: Batch) -> Int[Tensor, "B H W"]:
    """Return the class of each pixel. Raises UserError for images without masks."""
    if batch.maps is None:
        raise UserError(
            "got images without masks, which a segmenter is trained on; pass the folder of masks, each named as its "
            "image, with --annotations"
        )
    return batch.maps
