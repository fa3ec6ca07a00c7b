"""The interface of supervised methods (`tasks/`): a `Task` is a `Method` that predicts and is tested on other images.

    annotation the kind of annotation that the task predicts: classes, masks or boxes
    predict(images)        one prediction per image
    measure(batches, ...)  metrics of the predictions on annotated images
    headline               the metrics to report during training; the first one is the score
    recipe                 the recipe of its training, or the first word of its recipes' names
    describe(values)       those metrics in words

Fine-tuning, testing, prediction and export use these members only, so they work for every task. To add a task, add one
file to `tasks/` with a `Config(TaskConfig)` and one subclass of `Task`, and a recipe.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from unmask.batch import Batch
from unmask.method import Method, MethodConfig
from unmask.metrics.measurement import Measurement, Metric
from unmask.nn.inputs import Scale
from unmask.nn.vit import ViT, ViTConfig

if TYPE_CHECKING:
    from unmask.data.annotations.segmentation_masks import MaskOptions

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


class Task(Method, Generic[Prediction, Truth]):
    """A supervised method; see the module docstring.

    Prediction: type of one prediction. Truth: type of the annotations of the test images, or None for classes, which
    are in the batches. title: name of the task for messages. classes: names of the classes, in the order of the class
    numbers. recipe: the task's recipe, or the first word of the names of its recipes. recipe_depends_on: the properties
    by which one of several recipes is chosen.
    """

    annotation: ClassVar[Annotation]
    headline: ClassVar[tuple[Metric, ...]]
    title: ClassVar[str]
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
        """Return the headline metrics in words, such as '61.3% mean IoU, 80.0% of all pixels right'."""
        return ", ".join(f"{values[metric.name]:.1%} {metric.words}" for metric in cls.headline)
