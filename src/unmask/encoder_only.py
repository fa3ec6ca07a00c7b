"""An encoder without a task: imported weights (`unmask import`) whose pre-training method is unknown or unsupported.

A run with this method supports `embed`, `probe`, `finetune` and `pretrain --recipe NAME --from RUN`. This method has no
loss and no picture.
"""

from __future__ import annotations

from typing import Literal, NoReturn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.gpt import GPT, GPTConfig
from unmask.nn.vit import ViT, ViTConfig


class Config(MethodConfig):
    """Settings of an encoder without a task. origin: name of the file or folder that the weights were imported from."""

    name: Literal["encoder"] = "encoder"
    encoder: ViTConfig | GPTConfig
    origin: str = ""


class EncoderOnly(Method):
    """See the module docstring. An iGPT encoder is causal and has the start token, like the published ones."""

    encoder: ViT | GPT

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.origin = config.origin
        if isinstance(config.encoder, GPTConfig):
            self.encoder, self.fixed = GPT(config.encoder, images, causal=True), ("encoder.palette",)
        else:
            self.encoder = ViT(config.encoder, images)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        self._refuse()

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        self._refuse()

    def _refuse(self) -> NoReturn:
        origin = f" (imported from {self.origin})" if self.origin else ""
        raise UserError(
            f"got a run with an encoder only{origin}, which cannot be trained or drawn; pre-train it with "
            "`unmask pretrain DATA --from RUN --recipe NAME`, or use embed, probe or finetune"
        )
