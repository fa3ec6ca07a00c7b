"""Count the FLOPs that torch dispatches in a method's actual forward and backward pass, on the meta device.

As in published numbers, matrix products and convolutions count 2 FLOPs per multiply-accumulate, and sums, norms,
softmax and look-ups count nothing. Attention counts as its two matrix products, with or without a causal mask. Nothing
is computed and no weights are allocated, so counting a ViT-H is as fast as counting a small model. A method whose loss
depends on tensor values is counted on the CPU instead.

For n tokens of width d, a transformer block takes 12 n d^2 + 2 n^2 d multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.batch import ImageSpec
from unmask.config import Config
from unmask.engine.measure import example_batch
from unmask.method import Clock, Method
from unmask.nn.torch_internals import onednn_linear
from unmask.rng import Draws

COUNTED = 2  # number of images in the counted batch; BatchNorm needs more than one


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image.

    encoder, decoder, rest: FLOPs of these parts in the forward pass of the loss. training: FLOPs of the forward and the
    backward pass, about three times those of the forward pass. whole: FLOPs of the encoder's forward pass on all
    patches, without masking.
    """

    encoder: int
    decoder: int
    rest: int
    training: int
    whole: int

    @property
    def forward(self) -> int:
        return self.encoder + self.decoder + self.rest

    @property
    def masked(self) -> bool:
        """Whether the encoder's blocks skip the hidden patches.

        It is False if only the patch embedding skips the hidden patches.
        """
        return self.encoder < 0.98 * self.whole


def count_flops(config: Config, images: ImageSpec) -> Flops:
    """Count the FLOPs of one image for the method and settings of `config`.

    The loss of a custom method may depend on tensor values, which meta tensors do not have. torch then raises
    RuntimeError or NotImplementedError, and the pass is counted on the CPU. An error with another cause is raised again
    on the CPU.
    """
    try:
        return _count(config, images, "meta")
    except (RuntimeError, NotImplementedError):
        return _count(config, images, "cpu")


def typical_images(config: Config) -> ImageSpec:
    """Return the image properties that a configuration expects.

    Images are RGB unless the configuration sets the channels.
    """
    channels = config.data.channels or len(config.data.mean or config.data.std or (0, 0, 0))
    return ImageSpec(
        channels=channels, size=config.data.size, dtype="uint8", mean=(127.5,) * channels, std=(64.0,) * channels
    )


def blocks_flops(blocks: Iterable[nn.Module], tokens: int, width: int, *, last: int | None = None) -> int:
    """Count the FLOPs of transformer blocks alone on one sequence of `tokens` tokens of width `width`.

    last: number of tokens at the end of the sequence that the blocks compute (None: all); see `nn.blocks.Block`.
    """
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _counter() as counter:
        x = torch.empty(1, tokens, width)
        for block in blocks:
            block = block.to("meta")
            x = block(x) if last is None else block(x, last=last)
    return counter.get_total_flops()


def build_unallocated(config: Config, images: ImageSpec) -> Method:
    """Build the method without allocating its weights."""
    with torch.device("meta"):
        return config.build(images)


def _count(config: Config, images: ImageSpec, device: str) -> Flops:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        method = config.build(images)
    batch = example_batch(images, COUNTED, device)
    clock = Clock(0, 1, Draws(0, batch.epoch, batch.index))
    with sdpa_kernel(SDPBackend.MATH):
        with _counter() as counter:
            value: Tensor = method(batch, clock).value
            forward, parts = counter.get_total_flops(), counter.get_flop_counts()
            encoder, decoder = (_under(parts, f"{type(method).__name__}.{part}") for part in ("encoder", "decoder"))
            value.backward()
        with torch.no_grad(), _counter() as alone:
            method.encoder(batch.images)
    rest = forward - encoder - decoder
    assert rest >= 0, "a part was counted twice"
    each = (encoder, decoder, rest, counter.get_total_flops(), alone.get_total_flops())
    return Flops(*(number // COUNTED for number in each))


def _counter() -> FlopCounterMode:
    """Return a FLOP counter that also counts the matrix products that `nn.linear_layer` computes with oneDNN."""

    def flops(x: torch.Size, weight: torch.Size, *rest: object, out_shape: object = None) -> int:
        return 2 * x.numel() * weight[0]

    operator = onednn_linear()
    return FlopCounterMode(display=False, custom_mapping={} if operator is None else {operator: flops})


def _under(counts: dict[str, dict[object, int]], part: str) -> int:
    """Return the FLOPs counted in `part`, or in its outermost submodules if `part` itself was not called."""
    inside = [name for name in counts if name == part or name.startswith(part + ".")]
    largest = [name for name in inside if not any(name.startswith(other + ".") for other in inside)]
    return sum(sum(counts[name].values()) for name in largest)
