"""Patch masks: `Mask`, and the samplers that create one.

Indices run over the patch grid only, never with an offset for a class token. Every image of a batch keeps the same
number of patches, so shapes are static. A sampler is a function (B, grid, ratio, rng) -> Mask, and its draws depend on
the image (see `rng.py`), not on its place in the batch. MAE's Table 1f compares `random_mask`, `block_mask` and
`grid_mask`; `pattern_mask` uses patterns from a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.errors import UserError
from unmask.rng import Draws

BLOCK_TRIES = 10  # Number of rejected rectangles in a row after which the block sampler stops (BEiT).
BLOCK_PROPOSALS = 64  # Number of rectangles drawn for every image; enough unless blocks are very small.
BLOCK_ASPECT = 0.3  # Smallest height / width of a block; the largest is the inverse.
BEIT_SMALLEST_BLOCK = 16 / 196  # Least share of the grid in one block.


@dataclass(frozen=True)
class Mask:
    """`keep` (B, K) and `drop` (B, M): indices of the visible and of the hidden patches; K + M = N."""

    keep: Int[Tensor, "B K"]
    drop: Int[Tensor, "B M"]

    def hidden(self) -> Bool[Tensor, "B N"]:
        """Return flags in raster order, True for a hidden patch."""
        flags = torch.zeros(
            len(self.keep), self.keep.shape[1] + self.drop.shape[1], dtype=torch.bool, device=self.keep.device
        )
        return flags.scatter(1, self.drop, True)

    @property
    def order(self) -> Int[Tensor, "B N"]:
        """Return the indices of all patches, the visible ones first."""
        return torch.cat([self.keep, self.drop], 1)


def num_kept(num_patches: int, ratio: float) -> int:
    """Return how many patches stay visible: N (1 - ratio) rounded down, as in the official code.

    The official `int(N * (1 - ratio))` keeps one patch too few if rounding puts the product just below a whole number
    (N = 100, ratio 0.9 gives 9); the small term corrects that. Raises UserError if all or no patches would be hidden.
    """
    kept = math.floor(num_patches * (1 - ratio) + 1e-6)
    if not 0 < kept < num_patches:
        what = "nothing visible" if kept < 1 else "nothing hidden"
        raise UserError(
            f"got a mask ratio of {ratio}, which leaves {what} of {num_patches} patches; "
            f"choose a ratio between {1 / num_patches:.3g} and {1 - 1 / num_patches:.3g}"
        )
    return kept


def mask_from_noise(noise: Float[Tensor, "B N"], ratio: float) -> Mask:
    """Keep the patches with the smallest noise (official MAE). Ties go to the lower index on every device."""
    order = noise.argsort(dim=1, stable=True)
    kept = num_kept(noise.shape[1], ratio)
    return Mask(keep=order[:, :kept], drop=order[:, kept:])


def random_mask(batch: int, grid: tuple[int, int], ratio: float, rng: Draws) -> Mask:
    """Sample a mask for each image, uniformly without replacement (MAE section 3)."""
    noise = rng.uniform(grid[0] * grid[1])
    assert len(noise) == batch, "rng must have draws for as many images as the batch has"
    return mask_from_noise(noise, ratio)


def smallest_block(grid: tuple[int, int]) -> int:
    """Return the least number of patches in a block: 16 on BEiT's 14 x 14 grid, the same share of any other grid."""
    return max(1, round(BEIT_SMALLEST_BLOCK * grid[0] * grid[1]))


def require_blocks(grid: tuple[int, int], ratio: float, smallest: int) -> None:
    """Raise UserError if a block of `smallest` patches would hide more patches than the ratio allows."""
    n = grid[0] * grid[1]
    hidden = n - num_kept(n, ratio)
    if smallest > hidden:
        ways = f"set method.smallest_block={hidden} or less"
        if smallest < n:  # a block of all patches would need a ratio of 1
            ways += f", or method.mask_ratio={math.ceil(1000 * smallest / n) / 1000:g} or more"
        raise UserError(
            f"got a smallest block of {smallest} patches; method.mask_ratio={ratio:.4g} hides only {hidden} of the "
            f"{grid[0]} x {grid[1]} patches; {ways}"
        )


def block_mask(batch: int, grid: tuple[int, int], ratio: float, rng: Draws, smallest: int | None = None) -> Mask:
    """Sample blocks as BEiT's code does (Bao et al. 2021), but hide the same number of patches in every image.

    Rectangles are drawn one after another: area uniform between `smallest` and the number of patches that remain to be
    hidden, aspect log-uniform in [0.3, 1/0.3], both sides shorter than the grid's, corner anywhere. A rectangle is
    accepted if it hides at least one new patch and not more than remain to be hidden; after ten rejections in a row the
    sampler stops. BEiT's code thus hides the target number of patches or fewer; this function adds random single
    patches, because all images of a batch need the same number. Each of 64 proposals is processed for all images at
    once, without waiting for the host.
    """
    smallest = smallest_block(grid) if smallest is None else smallest
    (rows, cols), n = grid, grid[0] * grid[1]
    target = n - num_kept(n, ratio)
    draws = rng.uniform(4 * BLOCK_PROPOSALS + n)
    assert len(draws) == batch, "rng must have draws for as many images as the batch has"
    proposals = draws[:, : 4 * BLOCK_PROPOSALS].reshape(batch, BLOCK_PROPOSALS, 4)
    row = torch.arange(rows, device=draws.device)[None, :, None]  # (1, rows, 1)
    col = torch.arange(cols, device=draws.device)[None, None]  # (1, 1, cols)
    hidden = torch.zeros(batch, rows, cols, dtype=torch.bool, device=draws.device)
    failed = torch.zeros(batch, dtype=torch.int64, device=draws.device)
    for area, aspect, down, across in proposals.permute(1, 2, 0):  # each (B,)
        remaining = target - hidden.sum((1, 2))
        area = smallest + area * (remaining - smallest)
        aspect = torch.exp(math.log(BLOCK_ASPECT) * (1 - 2 * aspect))
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, left = (down * (rows - height + 1)).floor(), (across * (cols - width + 1)).floor()
        block = (row >= top[:, None, None]) & (row < (top + height)[:, None, None])
        block = block & (col >= left[:, None, None]) & (col < (left + width)[:, None, None])
        new = (block & ~hidden).sum((1, 2))
        fits = (height < rows) & (width < cols) & (new >= 1) & (new <= remaining) & (failed < BLOCK_TRIES)
        hidden = hidden | (block & fits[:, None, None])
        failed = torch.where(failed < BLOCK_TRIES, torch.where(fits, 0, failed + 1), failed)
    # Patches in blocks sort last, so they are hidden; the noise decides which single patches are hidden in addition.
    return mask_from_noise(draws[:, 4 * BLOCK_PROPOSALS :] + hidden.flatten(1), ratio)


def require_grid(grid: tuple[int, int], ratio: float) -> None:
    """Raise UserError unless one of every 2 x 2 patches can be kept: ratio 0.75 and an even grid."""
    if ratio != 0.75:
        raise UserError(
            f"got grid sampling with a mask ratio of {ratio:g}; it keeps one of every four patches, so the ratio is "
            "0.75: set method.mask_ratio=0.75, or method.mask=random for another ratio"
        )
    if grid[0] % 2 or grid[1] % 2:
        raise UserError(
            f"grid sampling on {grid[0]} x {grid[1]} patches is impossible; it keeps one of every 2 x 2, so both "
            "numbers must be even: change data.size or method.encoder.patch, or set method.mask=random"
        )


def grid_mask(batch: int, grid: tuple[int, int], ratio: float, rng: Draws) -> Mask:
    """Keep the upper left of every 2 x 2 patches, the same in every image (grid sampling of MAE's Table 1f)."""
    require_grid(grid, ratio)
    hidden = torch.ones(grid, dtype=torch.bool, device=rng.index.device)
    hidden[::2, ::2] = False
    return _mask_of(hidden.flatten().expand(batch, -1), kept=hidden.numel() // 4)


def pattern_mask(patterns: Bool[Tensor, "n N"], kept: int, rng: Draws) -> Mask:
    """Sample one of the given patterns for each image. patterns: True for hidden patches; every pattern keeps `kept`
    patches visible.
    """
    which = (rng.uniform(1)[:, 0] * len(patterns)).long()  # (B,)
    return _mask_of(patterns[which], kept)


def _mask_of(hidden: Bool[Tensor, "B N"], kept: int) -> Mask:
    """Return a mask with visible and hidden patches each in raster order. kept: number of visible patches of each
    image, passed in so that the host does not wait for a count.
    """
    order = hidden.int().argsort(dim=1, stable=True)
    return Mask(keep=order[:, :kept], drop=order[:, kept:])


def read_patterns(rows: Sequence[Sequence[str]], grid: tuple[int, int]) -> Bool[Tensor, "n N"]:
    """Parse patterns, which have one string for each row of the grid: "#" is a hidden patch, "." a visible one.

    Raises UserError for a size that differs from the grid, for other characters, and for patterns that hide all
    patches, no patch, or a different number of patches than the other patterns.
    """
    flags = []
    for number, pattern in enumerate(rows, 1):
        shape = {len(row) for row in pattern}
        if len(pattern) != grid[0] or shape != {grid[1]}:
            got = f"{len(pattern)} x {shape.pop() if len(shape) == 1 else 'unequal'}"
            raise UserError(
                f"got mask pattern {number} of {got} characters; expected {grid[0]} x {grid[1]}, one for each patch; "
                "redraw it, or change data.size or method.encoder.patch"
            )
        if wrong := set("".join(pattern)) - set("#."):
            raise UserError(f"got {sorted(wrong)} in mask pattern {number}; use '#' for hidden and '.' for visible")
        flags.append([letter == "#" for row in pattern for letter in row])
    hidden = torch.tensor(flags, device="cpu")
    counts = sorted({sum(pattern) for pattern in flags})
    if len(counts) != 1 or not 0 < counts[0] < hidden.shape[1]:
        raise UserError(
            f"got mask patterns that hide {' or '.join(map(str, counts))} of {hidden.shape[1]} patches; make all "
            "patterns hide the same number, at least one and not all, because the images of a batch share their shapes"
        )
    return hidden


def nearest_visible(mask: Mask, grid: tuple[int, int]) -> Int[Tensor, "B M"]:
    """Return the index of the visible patch nearest to each hidden patch (Euclidean; ties go to the lower index)."""
    one_by_one = [_nearest(keep.sort().values, drop, grid[1]) for keep, drop in zip(mask.keep, mask.drop, strict=True)]
    return torch.stack(one_by_one)  # one image at a time: the distances of all images would not fit in memory


def _nearest(keep: Int[Tensor, " K"], drop: Int[Tensor, " M"], cols: int) -> Int[Tensor, " M"]:
    down = (drop // cols)[:, None] - keep // cols  # (M, K)
    across = (drop % cols)[:, None] - keep % cols
    distance = down.square() + across.square()
    first = (distance == distance.amin(1, keepdim=True)).int().argmax(1)  # argmax returns the first of equal values
    return keep[first]
