"""The interface of supervised methods (`tasks/`): a `Task` is a `Method` that predicts and is tested on other images.

    annotation             the kind of annotation that the task predicts: a class, a mask or boxes
    predict(images)        one prediction per image
    measure(batches, ...)  metrics of the predictions on annotated images
    headline               the metrics to report during training; the first one is the score
    recipe                 the recipe of its training, or the first word of its recipes' names
    describe(values)       those metrics in words

Fine-tuning, testing, prediction and export use these members only and do not depend on the task. To add a task, add one
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
"""The properties by which the recipe of a task is chosen: width of the encoder, number of labelled images."""
Prediction = TypeVar("Prediction")
Truth = TypeVar("Truth")


class TaskConfig(MethodConfig):
    """Base of every task's settings. classes: names, in the order of the class numbers."""

    encoder: ViTConfig
    classes: tuple[str, ...]

    @property
    def ignored_ids(self) -> tuple[int, ...]:
        """Ids in mask files that do not denote a class, or () for tasks without masks."""
        return ()

    def mask_options(self, *, of_training_images: bool) -> MaskOptions | None:
        """Return how to read masks, or None for tasks without masks.

        of_training_images: whether the masks belong to the training images; others may be stored in another way.
        """
        return None


class Task(Method, Generic[Prediction, Truth]):
    """A supervised method; see the module docstring. `classes`: names, in the order of the class numbers.

    Prediction: type of one prediction. Truth: type of the annotations of the test images, or None for classes, which
    are in the batches. title: the task's name for messages. recipe: its recipe, or the first word of the names of its
    recipes. recipe_depends_on: the properties by which one of several recipes is chosen.
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
        """Return whether test images are resized to the encoder's input size as a whole, instead of cropped."""
        return cls.annotation != "classes"

    @abstractmethod
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, *, scale: Scale | None = None
    ) -> list[Prediction]:
        """Return one prediction per image. Called without gradients, in eval mode.

        images: (B, C, H, W) in the files' units. sizes: (H, W) of each image file; masks and boxes are returned in its
        pixels. None: in pixels of `images`. scale: see `ImageEncoder.accept`. Raises UserError for images that the
        encoder cannot accept.
        """

    @abstractmethod
    def measure(self, batches: Iterable[Batch], truth: Truth) -> Measurement:
        """Compare predictions with annotations. Called in eval mode, without gradients, under the caller's autocast.

        Raises UserError if no metric can be computed.
        """

    @classmethod
    def describe(cls, values: Mapping[str, float]) -> str:
        """Return the headline metrics in words, such as '61.3% mean IoU, 80.0% of all pixels right'."""
        return ", ".join(f"{values[metric.name]:.1%} {metric.words}" for metric in cls.headline)
