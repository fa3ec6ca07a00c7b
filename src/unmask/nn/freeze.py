"""Freeze an encoder for a task: completely, up to its last blocks, or not at all (He et al. 2021, Fig. 9)."""

from __future__ import annotations

from unmask.nn.vit import ViT

MLP_ALONE = 0.5


def check_blocks(asked: float | None, depth: int) -> None:
    """Validate: raise ValueError unless `asked` is a valid number of last blocks of `depth` blocks."""
    if asked is not None and asked != MLP_ALONE and asked not in range(depth + 1):
        raise ValueError(
            f"got last_blocks={asked:g} for an encoder of {depth} blocks; expected 0 (the head alone), 0.5 (the MLP of "
            f"the last block) or a whole number up to {depth}"
        )


def freeze(encoder: ViT, last_blocks: float | None) -> None:
    """Train only the last blocks. The encoder's final norm is not used by tasks, so it is always frozen."""
    depth = len(encoder.blocks)
    encoder.norm.requires_grad_(False)
    if last_blocks is None or last_blocks == depth:
        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(True)  # the official fine-tuning trains the sine-cosine table too
        return
    encoder.requires_grad_(False)
    if last_blocks == MLP_ALONE:
        last = encoder.blocks[-1]
        for part in (last.norm2, last.mlp, last.ls2):  # type: ignore[union-attr]
            part.requires_grad_(True)
    else:
        for block in encoder.blocks[depth - int(last_blocks) :]:
            block.requires_grad_(True)
