"""The interface of supervised methods (`tasks/`): a `Task` is a `Method` that predicts and is tested on other images.

    annotation             the kind of annotation that the task predicts: classes, masks or boxes
    needs                  the annotations that the data must have, in words for `unmask finetune --help`
    predict(images)        one prediction per image
    measure(batches, ...)  metrics of the predictions on annotated images
    headline               the metrics to report during training; the first one is the score
    recipe                 the recipe of its training, or the first word of its recipes' names
    describe(values)       the headline metrics in words

Fine-tuning, testing, prediction and export use these members and the members of `TaskConfig` only, so they work for
every task. To add a task, add one file to `tasks/` with a `Config` and one subclass of `Task`, and a recipe.
`Config` is a subclass of `TaskConfig`, of `MaskTaskConfig` for tasks that read segmentation
masks, and of `PartialTaskConfig` for tasks that can train the last blocks of the encoder only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import model_validator
from torch import Tensor

from unmask.batch import IGNORED, Batch
from unmask.data.annotations.segmentation_masks import MaskOptions, SegmentationMasks, first_ids
from unmask.method import Method, MethodConfig
from unmask.metrics.measurement import Measurement, Metric
from unmask.nn.freeze import check_blocks
from unmask.nn.inputs import Scale
from unmask.nn.vit import ViT, ViTConfig

Annotation = Literal["classes", "masks", "boxes"]
"""One class per image, one class per pixel, or boxes with a class each."""
RecipeChoice = Literal["nothing", "width", "width and labels"]
"""The properties that determine the recipe of a task: the width of the encoder, the number of labelled images."""
Prediction = TypeVar("Prediction")
Truth = TypeVar("Truth")


class TaskConfig(MethodConfig):
    """Base class of every task's settings. classes: names of the classes, in the order of the class numbers."""

    encoder: ViTConfig
    classes: tuple[str, ...]

    @property
    def ignored_ids(self) -> tuple[int, ...]:
        """Ids in mask files that do not denote a class, or () for tasks without masks."""
        return ()

    def mask_options(self, *, of_training_images: bool) -> MaskOptions | None:
        """Return how to read masks, or None for tasks without masks.

        of_training_images: whether the masks belong to the training images; masks of test images may be stored
        differently.
        """
        return None

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The id of each class in mask files."""
        return tuple(range(len(self.classes)))

    @property
    def trained_blocks(self) -> float | None:
        """Number of last blocks of the encoder that are trained with the head, or None for the whole encoder."""
        return None

    @classmethod
    def refusal(cls, asked: Mapping[str, Any]) -> str | None:
        """Return why the user cannot set `asked`, such as {"method.width": 64}, or None if that is allowed."""
        if "method.classes" in asked:
            return (
                "method.classes cannot be set: classes are read from the data; name them by sub-folders, in "
                "classes.txt or in the annotations"
            )
        return None

    def with_masks(self, masks: SegmentationMasks) -> Self:
        """Return these settings with the options for reading the masks, so that a resumed run reads them again."""
        return self

    def from_scratch(self) -> Self:
        """Return these settings for training from random weights."""
        return self


class MaskTaskConfig(TaskConfig):
    """Base class of the settings of tasks that read segmentation masks.

    ignored: ids in the mask files that are not classes; they are stored so that other masks are read in the same way.
    values: the id of each class (None: all ids that are not ignored). stored_pixels: whether masks belong to the stored
    pixels of images with an EXIF orientation.
    """

    ignored: tuple[int, ...] = (IGNORED,)
    values: tuple[int, ...] | None = None
    stored_pixels: bool = False

    @property
    def ignored_ids(self) -> tuple[int, ...]:
        return self.ignored

    def mask_options(self, *, of_training_images: bool) -> MaskOptions:
        return MaskOptions(self.values or (), stored=self.stored_pixels if of_training_images else None)

    @property
    def class_ids(self) -> tuple[int, ...]:
        return self.values or tuple(first_ids(len(self.classes), self.ignored))

    @classmethod
    def refusal(cls, asked: Mapping[str, Any]) -> str | None:
        why = {
            "method.ignored": "this setting is needed before the masks are read; give --ignore ID",
            "method.values": "this setting is needed before the masks are read; give --mask-values ID,ID",
            "method.stored_pixels": "its value is detected when the masks are read; leave it out",
        }
        refused = [f"{key} cannot be set: {reason}" for key, reason in why.items() if key in asked]
        return refused[0] if refused else super().refusal(asked)

    def with_masks(self, masks: SegmentationMasks) -> Self:
        changes: dict[str, Any] = {"stored_pixels": masks.stored, "ignored": masks.ignored}
        if masks.values:  # if 255 is a class, it is not ignored
            changes["values"] = masks.values
        return self.model_copy(update=changes)


class PartialTaskConfig(TaskConfig):
    """Base class of the settings of tasks that accept `unmask finetune --last-blocks` and apply it with `nn.freeze`.

    last_blocks: number of the encoder's last blocks that are trained with the head (None: the whole encoder). With 0
    only the head is trained, and with 0.5 also the MLP of the last block.
    """

    last_blocks: float | None = None

    @model_validator(mode="after")
    def _blocks_that_there_are(self) -> Self:
        check_blocks(self.last_blocks, self.encoder.depth)
        return self

    @property
    def trained_blocks(self) -> float | None:
        return self.last_blocks


class Task(Method, Generic[Prediction, Truth]):
    """A supervised method; see the module docstring.

    Prediction: type of one prediction. For classes it is (K,) float32 probabilities, for masks (H, W) int64 class
    numbers, for boxes `tasks.detect.Found`. Truth: type of the annotations of the test images, or None for classes,
    which are in the batches. title: name of the task for messages. classes: names of the classes, in the order of the
    class numbers. needs: phrase for help texts that names the annotations of the data, or an empty string for a task
    that `unmask finetune` does not offer; it must be a literal, because it is read without importing the file. recipe:
    the task's recipe, or the first word of the names of its recipes. recipe_depends_on: the properties by which one of
    several recipes is chosen.
    """

    annotation: ClassVar[Annotation]
    headline: ClassVar[tuple[Metric, ...]]
    title: ClassVar[str]
    needs: ClassVar[str]
    recipe: ClassVar[str]
    recipe_depends_on: ClassVar[RecipeChoice] = "width"
    encoder: ViT
    classes: tuple[str, ...]

    @classmethod
    def whole_images(cls) -> bool:
        """Return whether whole test images are resized to the encoder's input size, instead of cropped to it."""
        return cls.annotation != "classes"

    @abstractmethod
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, *, scale: Scale | None = None
    ) -> list[Prediction]:
        """Return one prediction per image. The caller disables gradients and sets eval mode.

        images: (B, C, H, W) in the files' units. sizes: (H, W) of each image file, in whose pixels masks and boxes are
        returned (None: in pixels of `images`). scale: see `ImageEncoder.accept`. Raises UserError for images that the
        encoder cannot accept.
        """

    @abstractmethod
    def measure(self, batches: Iterable[Batch], truth: Truth) -> Measurement:
        """Compare predictions with annotations. The caller sets eval mode and autocast, and disables gradients.

        Raises UserError if no metric can be computed.
        """

    @classmethod
    def describe(cls, values: Mapping[str, float]) -> str:
        """Return the headline metrics in words, such as '61.3% mean IoU, 80.0% pixel accuracy'."""
        return ", ".join(f"{values[metric.name]:.1%} {metric.words}" for metric in cls.headline)
