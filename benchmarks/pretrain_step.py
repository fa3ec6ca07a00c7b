"""One MAE pre-training step (forward, backward, AdamW): unmask beside transformers' ViTMAEForPreTraining, same sizes.

    python benchmarks/pretrain_step.py [--recipes mae_base] [--batch 16] [--rounds 5]

Both in the precision that `unmask` chooses here and in float32, both with the fused AdamW, in turns in one process.
Also reports the memory that one forward pass keeps for its backward pass.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from measure import medians, write

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock
from unmask.plan import autocast, choose_device, choose_precision
from unmask.recipes.catalogue import find
from unmask.rng import Draws

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["mae_nano", "mae_small", "mae_base"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = choose_device("auto")
    rows = []
    for recipe in options.recipes:
        batch = options.batch * (8 if recipe == "mae_nano" else 1)
        for precision in dict.fromkeys([choose_precision("auto", device)[0], "fp32"]):
            ours, theirs = our_step(recipe, batch, precision, device), their_step(recipe, batch, precision, device)
            found = medians({"unmask": ours, "transformers": theirs}, rounds=options.rounds)
            kept = {"unmask": saved_mib(ours), "transformers": saved_mib(theirs)}
            rows.append(
                {"recipe": recipe, "batch": batch, "precision": precision,
                 "unmask_images_per_s": batch / found["unmask"],
                 "transformers_images_per_s": batch / found["transformers"],
                 "speed_ratio": found["transformers"] / found["unmask"],
                 "unmask_saved_mib": kept["unmask"], "transformers_saved_mib": kept["transformers"],
                 "memory_ratio": kept["transformers"] / kept["unmask"]}
            )  # fmt: skip
    write("pretrain_step", rows)


def our_step(recipe: str, batch: int, precision: str, device: str) -> Callable[[], object]:
    config = find(recipe)
    size = config.data.size
    method = config.build(ImageSpec(3, size, "uint8", MEAN, STD)).to(device)
    optimizer = torch.optim.AdamW(method.parameters(), fused=True)
    index = torch.arange(batch)
    data = Batch(torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8), index, index * 0).to(device)
    clock = Clock(0, 1, Draws(0, data.epoch, data.index))

    def step() -> None:
        with autocast(precision, device):
            loss = method(data, clock).value
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(recipe: str, batch: int, precision: str, device: str) -> Callable[[], object]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = find(recipe)
    encoder, decoder = config.method.encoder, config.method.decoder  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=encoder.width, num_hidden_layers=encoder.depth, num_attention_heads=encoder.heads,
                intermediate_size=4 * encoder.width, image_size=config.data.size[0], patch_size=encoder.patch[0],
                decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
                decoder_num_attention_heads=decoder.heads, decoder_intermediate_size=4 * decoder.width,
                norm_pix_loss=True, layer_norm_eps=1e-6,
            )
        ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], fused=True)
    images = torch.randn(batch, 3, *config.data.size, device=device)

    def step() -> None:
        with autocast(precision, device):
            loss = method(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_mib(step: Callable[[], object]) -> float:
    """MiB of tensors that the step's forward pass keeps for the backward pass, parameters included."""
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(seen.values()) / 2**20


if __name__ == "__main__":
    main()
