"""The tables of the MAE paper: for every cell its name, its settings over a base recipe, and the published accuracy.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners": Table 1 a-f, Figures 5, 7 and 9. The paper trains a
ViT-L for 800 epochs on ImageNet-1K (decoder 8 x 512, plain pixels, random-resized crops, 75 % hidden at random) unless
a cell varies one of these. The field `paper` of a cell has the ImageNet top-1 accuracy in percent, after fine-tuning
and with a linear probe. As in the paper, the base row of every table predicts plain pixels, not normalised ones. The
table `family` is not in the paper; the published linear probes beside it belong to models of very different sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from unmask.errors import UserError, nearest

if TYPE_CHECKING:
    from unmask.config import Config

PLAIN_PIXELS = "method.target=pixels"
TOKENIZER, PRETRAINED = "tokenizer", "pretrained"
SHARED = (TOKENIZER, PRETRAINED)  # runs that other cells start from; they are not rows of the comparison


@dataclass(frozen=True)
class Paper:
    """Published top-1 accuracy on ImageNet-1K in percent, None if unpublished."""

    fine_tuned: float | None
    linear: float | None


UNPUBLISHED = Paper(None, None)


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    name: name of the folder. label: label on the page. settings: settings over the base recipe. paper: published
    accuracy. theirs: label of the cell in the paper, or "". at: position on the axis of the picture, or None for a
    category. length: training length relative to the table's steps. base: whether this is the base row, with which the
    others are compared and which is probed with controls. recipe: recipe to use instead of the table's. tokenizer:
    whether the cell trains with the dVAE of the cell TOKENIZER. equal: what the cell has in common with the base row,
    "steps" or "compute".
    """

    name: str
    label: str
    settings: tuple[str, ...] = ()
    paper: Paper = UNPUBLISHED
    theirs: str = ""
    at: float | None = None
    length: float = 1.0
    base: bool = False
    recipe: str | None = None
    tokenizer: bool = False
    equal: str = "steps"


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    axis: what the cells vary, in words. varies: keys of the settings that the cells vary and a user cannot set. cells:
    function that returns the cells for a base configuration, of which some settings are fractions. base: settings that
    all cells have. log: whether the axis of the picture is logarithmic. measure: the accuracy by which cells are
    compared. If it is "fine_tuned", all cells are classifiers that are fine-tuned from the run PRETRAINED.
    """

    name: str
    title: str
    axis: str
    varies: tuple[str, ...]
    cells: Callable[[Config], tuple[Cell, ...]]
    note: str = ""
    base: tuple[str, ...] = (PLAIN_PIXELS,)
    log: bool = False
    measure: Literal["linear", "fine_tuned"] = "linear"


def find_table(name: str) -> Table:
    """Return a table by its name. Raises UserError with the nearest names for an unknown name."""
    if name not in TABLES:
        raise UserError(f"table {name!r} is not known; {nearest(name, TABLES)}")
    return TABLES[name]


def _depths(base: Config) -> tuple[Cell, ...]:
    published = {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}
    return tuple(
        Cell(f"depth-{n}", str(n), (f"method.decoder.depth={n}",), Paper(*both), str(n), n, base=n == 8)
        for n, both in published.items()
    )


def _widths(base: Config) -> tuple[Cell, ...]:
    """Vary the decoder width: the shares 128/1024 to 1024/1024 of the encoder's width, as in the paper."""
    published = {128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)}
    settings: Any = base.method
    full, one_head = settings.encoder.width, settings.decoder.width / settings.decoder.heads
    cells = []
    for theirs, both in published.items():
        width = max(8, round(full * theirs / 1024 / 8) * 8)
        heads = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - width / one_head), -n))
        chosen = (f"method.decoder.width={width}", f"method.decoder.heads={heads}")
        label = f"{width} ({heads} head{'s' * (heads > 1)})"
        cells.append(
            Cell(f"width-{width}", label, chosen, Paper(*both), str(theirs), theirs / 1024, base=theirs == 512)
        )
    return tuple(cells)


def _mask_tokens(base: Config) -> tuple[Cell, ...]:
    return (
        Cell("encoder-with-mask-tokens", "encoder with [M]", ("method.mask_tokens=encoder",), Paper(84.2, 59.6)),
        Cell("encoder-without", "encoder without [M]", ("method.mask_tokens=decoder",), Paper(84.9, 73.5), base=True),
    )


def _targets(base: Config) -> tuple[Cell, ...]:
    return (
        Cell("pixels", "pixels", ("method.target=pixels",), Paper(84.9, 73.5), base=True),
        Cell("norm-pixels", "pixels, normalised", ("method.target=norm_pixels",), Paper(85.4, 73.9)),
        Cell("pca", "PCA coefficients", ("method.target=pca",), Paper(84.6, 72.3)),
        Cell("tokens", "dVAE tokens", ("method.target=tokens",), Paper(85.3, 71.6), tokenizer=True),
    )


def _augmentations(base: Config) -> tuple[Cell, ...]:
    def crop(kind: str, flip: float, jitter: float) -> tuple[str, ...]:
        return f"data.crop.kind={kind}", f"data.crop.flip={flip}", f"data.crop.jitter={jitter}"

    return (
        Cell("none", "none: centre crop, no flip", crop("center", 0, 0), Paper(84.0, 65.7)),
        Cell("fixed-size", "crop of fixed size", crop("random", 0.5, 0), Paper(84.7, 73.1)),
        Cell("random-size", "crop of random size", crop("random_resized", 0.5, 0), Paper(84.9, 73.5), base=True),
        Cell("jitter", "crop of random size + colour jitter", crop("random_resized", 0.5, 0.4), Paper(84.3, 71.9)),
    )


def _samplings(base: Config) -> tuple[Cell, ...]:
    published = {
        ("random", 75): (84.9, 73.5), ("block", 50): (83.9, 72.3), ("block", 75): (82.8, 63.9),
        ("grid", 75): (84.0, 66.0),
    }  # fmt: skip
    return tuple(
        Cell(
            f"{kind}-{percent}",
            f"{kind}, {percent} %",
            (f"method.mask={kind}", f"method.mask_ratio={percent / 100}"),
            Paper(*both),
            base=kind == "random",
        )
        for (kind, percent), both in published.items()
    )


def _ratios(base: Config) -> tuple[Cell, ...]:
    published = {
        10: (83.2, 54.6), 20: (83.4, 58.9), 30: (83.4, 61.7), 40: (84.7, 67.0), 50: (84.9, 69.9), 60: (85.0, 71.8),
        70: (84.9, 73.2), 75: (84.9, 73.5), 80: (84.5, 71.8), 90: (83.0, 66.1),
    }  # fmt: skip
    return tuple(
        Cell(
            f"ratio-{percent}", f"{percent} %", (f"method.mask_ratio={percent / 100}",), Paper(*both), f"{percent} %",
            percent, base=percent == 75,
        )
        for percent, both in published.items()
    )  # fmt: skip


def _lengths(base: Config) -> tuple[Cell, ...]:
    published = {100: (82.3, 57.3), 200: (83.3, 64.4), 400: (84.3, 69.7), 800: (84.9, 73.5), 1600: (85.1, 75.1)}
    return tuple(
        Cell(
            f"length-{epochs // 100}x", f"{epochs // 100}x", (), Paper(*both), f"{epochs} epochs", epochs / 100,
            epochs / 100, base=epochs == 800,
        )
        for epochs, both in published.items()
    )  # fmt: skip


PARTIAL = {0: 73.5, 0.5: 79.1, 1: 81.0, 2: 83.1, 4: 84.2, 6: 84.4, 12: 84.6, 18: 84.7, 24: 84.9}
PARTIAL_DEPTH = 24
FINE_TUNING_LENGTH = 1 / 8  # default length of fine-tuning relative to pre-training; in the paper, 100 and 800 epochs


def _last_blocks(base: Config) -> tuple[Cell, ...]:
    """Vary the number of fine-tuned blocks: 0, 1/2 (the last MLP), 1, 2, 4, ..., all.

    For an encoder of 24 blocks, the numbers of tuned blocks are those of the paper.
    """
    settings: Any = base.method
    depth = settings.encoder.depth
    whole = [1 << n for n in range(depth.bit_length()) if 1 << n < depth] + [depth]
    cells = []
    for place, blocks in enumerate(list(PARTIAL) if depth == PARTIAL_DEPTH else [0, 0.5, *whole]):
        theirs = like_paper(blocks, depth)
        label = {0: "0: the head alone", 0.5: "1/2: the MLP of the last block", depth: f"{depth}: all"}.get(blocks)
        name = "half" if blocks == 0.5 else str(blocks)
        same = " of 24" if theirs > 0.5 else ""
        cells.append(
            Cell(
                f"blocks-{name}", label or str(blocks), (f"method.last_blocks={blocks}",),
                Paper(PARTIAL[theirs], None), f"{'1/2' if theirs == 0.5 else theirs}{same}", place, FINE_TUNING_LENGTH,
                base=blocks == depth,
            )
        )  # fmt: skip
    return tuple(cells)


def like_paper(blocks: float, depth: int) -> float:
    """Return the number of tuned blocks in the paper that is compared with `blocks` of `depth`.

    It is the number n for which n / 24 is nearest to blocks / depth; 0 and 1/2 are unchanged.
    """
    if blocks < 1:
        return blocks
    return min((n for n in PARTIAL if n >= 1), key=lambda n: abs(n / PARTIAL_DEPTH - blocks / depth))


FAMILY = {
    "ae": "ae_nano",
    "dae": "dae_nano",
    "igpt": "igpt_nano",
    "igpt_bert": "igpt_bert_nano",
    "mpp": "mpp_nano",
    "beit": "beit_nano",
    "simmim": "simmim_nano",
    "crossmae": "crossmae_nano",
    "mae": "mae_nano",
}
IN_WORDS = {
    "ae": "autoencoder", "dae": "denoising autoencoder", "igpt": "iGPT, next pixel", "igpt_bert": "iGPT, hidden pixels",
    "mpp": "ViT masked patch prediction", "beit": "BEiT", "simmim": "SimMIM", "crossmae": "CrossMAE", "mae": "MAE",
}  # fmt: skip
PUBLISHED = {"igpt": Paper(None, 69.0), "beit": Paper(85.2, 52.1), "mae": Paper(85.9, 75.8)}


def _family(base: Config) -> tuple[Cell, ...]:
    """Return two cells for every method except MAE: with as many steps as MAE, and with as many FLOPs as MAE."""
    by_steps = [
        Cell(
            f"{name}-equal-steps", IN_WORDS[name], (), PUBLISHED.get(name, UNPUBLISHED), base=name == "mae",
            recipe=recipe, tokenizer=name == "beit",
        )
        for name, recipe in FAMILY.items()
    ]  # fmt: skip
    by_compute = [
        Cell(f"{name}-equal-compute", IN_WORDS[name], (), recipe=recipe, tokenizer=name == "beit", equal="compute")
        for name, recipe in FAMILY.items()
        if name != "mae"
    ]
    return *by_steps, *by_compute


TABLES = {
    table.name: table
    for table in (
        Table(
            "1a", "Table 1a: decoder depth", "decoder blocks", ("method.decoder.depth",), _depths, log=True,
            note="The decoder depths are those of the paper, also for encoders with fewer blocks than the paper's 24.",
        ),
        Table(
            "1b", "Table 1b: decoder width", "decoder width as a share of the encoder's",
            ("method.decoder.width", "method.decoder.heads"), _widths, log=True,
            note="The paper's widths of 128 to 1024 are taken as shares of the encoder's width (1024 in the paper); "
            "the width of a head stays about that of the recipe.",
        ),
        Table(
            "1c", "Table 1c: mask tokens in the encoder", "encoder", ("method.mask_tokens",), _mask_tokens,
            note="With mask tokens in the encoder, training takes 3.3 times the FLOPs (ViT-L, decoder 8 x 512) and 2.8 "
            "times the hours (Table 2) in the paper.",
        ),
        Table(
            "1d", "Table 1d: reconstruction target", "target", ("method.target",), _targets, base=(),
            note="The paper's tokens come from a dVAE trained on 250 million images; here the dVAE is trained on the "
            "same images as all cells.",
        ),
        Table(
            "1e", "Table 1e: data augmentation", "augmentation",
            ("data.crop.kind", "data.crop.flip", "data.crop.jitter", "data.crop.eval_share"), _augmentations,
            base=(PLAIN_PIXELS, "data.crop.eval_share=0.875"),
            note="Crops of fixed size, and the centre crops of the probes, are 7/8 of the image's side (224 of 256 in "
            "the paper).",
        ),
        Table(
            "1f", "Table 1f: mask sampling", "sampling", ("method.mask", "method.mask_ratio"), _samplings,
        ),
        Table("fig5", "Figure 5: masking ratio", "hidden patches, %", ("method.mask_ratio",), _ratios),
        Table(
            "fig7", "Figure 7: training length", "training length", ("train.steps",), _lengths, log=True,
            note="1x is 100 epochs in the paper, and the length of the shortest run here. Without a "
            "budget, 8x (800 epochs in the paper) has the length of the recipe; a length given with --set applies to "
            "1x. Every run has a complete schedule of its own, with the same share of warm-up.",
        ),
        Table(
            "fig9", "Figure 9: partial fine-tuning", "fine-tuned blocks", ("method.last_blocks",), _last_blocks,
            measure="fine_tuned",
            note="Each number of blocks is compared with the paper's number that is nearest as a share of the depth "
            "(24 blocks in the paper). In the paper, MoCo v3 reaches 77.6 with 0 tuned blocks, and 79.9, 80.8, 81.6, "
            "81.9, 83.2, 83.8 and 84.1 with 1, 2, 4, 6, 12, 18 and 24 tuned blocks: more than MAE with 0 blocks, less "
            "with 1 or more. The paper's result for 0 is its linear probe (LARS, BatchNorm); here every cell has the "
            "same head, optimiser and steps, while the paper uses the best of 50, 100 and 200 epochs. Mixup, cutmix, "
            "random augmentation, drop path and layer-wise decay are not used here.",
        ),
        Table(
            "family", "The family, from autoencoder to MAE", "method", ("method.name",), _family, base=(),
            note="Every method is trained with its own recipe, once for as many steps as MAE and once for as many "
            "FLOPs (forward and backward). The published numbers are from Tables 3 and 12 of the MAE paper, for models "
            "of very different sizes: iGPT-L has 1362 M parameters and uses VQ-VAE codes (65.2 on 48 x 48 pixels in "
            "the iGPT paper), BEiT-L and MAE ViT-L have 304 M.",
        ),
    )
}  # fmt: skip
