"""The contract of supervised methods (`tasks/`): a `Task` is a `Method` that predicts and is measured on test images.

    annotation             the annotation of an image, which the task predicts: its class, a mask or boxes
    predict(images)        one prediction per image
    measure(batches, ...)  how good the predictions are on annotated images
    headline               the metrics that are followed during training, the first of which counts
    describe(values)       those metrics in words

Fine-tuning, tests, prediction and export use these members and never ask which task it is. To add a task, add one file
to `tasks/` with a `Config(TaskConfig)` and one subclass of `Task`, and a recipe.
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
Prediction = TypeVar("Prediction")
Truth = TypeVar("Truth")


class TaskConfig(MethodConfig):
    """Base of every task's settings. classes: names, in the order of the class numbers."""

    encoder: ViTConfig
    classes: tuple[str, ...]

    @property
    def ignored_ids(self) -> tuple[int, ...]:
        """Ids in mask files that are no class; () where a task has no masks."""
        return ()

    def mask_options(self, *, of_training_images: bool) -> MaskOptions | None:
        """How masks are read, None where a task has none; those of other images may be stored otherwise."""
        return None


class Task(Method, Generic[Prediction, Truth]):
    """A supervised method; see the module docstring. `classes`: names, in the order of the class numbers.

    Prediction: one prediction. Truth: the annotations that test images are compared with, None for classes, which come
    with the batches. title: what the task is called. head_name: the part beside the encoder, for messages of exports.
    """

    annotation: ClassVar[Annotation]
    headline: ClassVar[tuple[Metric, ...]]
    title: ClassVar[str]
    encoder: ViT
    classes: tuple[str, ...]

    @classmethod
    def whole_images(cls) -> bool:
        """Whether test images are squeezed to the size of the encoder instead of cropped: every pixel may matter."""
        return cls.annotation != "classes"

    @abstractmethod
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, *, scale: Scale | None = None
    ) -> list[Prediction]:
        """Predict without gradients, in eval mode: (B, C, H, W) in the files' units -> B predictions.

        sizes: (H, W) of each image file, in whose pixels masks and boxes are given; None for those of `images`. scale:
        see `ImageEncoder.accept`. Raises UserError for images that the encoder cannot accept.
        """

    @abstractmethod
    def measure(self, batches: Iterable[Batch], truth: Truth) -> Measurement:
        """Compare predictions with annotations; in eval mode, without gradients, under the caller's autocast.

        Raises UserError where nothing can be measured.
        """

    @classmethod
    def describe(cls, values: Mapping[str, float]) -> str:
        """Return the headline metrics in words, such as '61.3% mean IoU, 80.0% of all pixels right'."""
        return ", ".join(f"{values[metric.name]:.1%} {metric.words}" for metric in cls.headline)
