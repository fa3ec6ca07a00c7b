"""Images per second from JPEG files to augmented batches: unmask's loader beside a plain Pillow data set.

    python benchmarks/loading.py FOLDER [--size 224] [--workers 0 2]

FOLDER holds JPEGs. The rival is what most people write: Image.open, convert, random resized crop, flip, to tensor, in a
DataLoader with as many workers. Both give uint8 batches of 64, random resized crop with scale (0.2, 1) and flip.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
from measure import medians, write
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from unmask.batch import ImageSpec
from unmask.data.augment import CROP_DRAWS, CropConfig, crop_boxes
from unmask.data.loader import Images, training_batches
from unmask.data.sources import open_source

BATCH = 64


class PillowImages(Dataset):
    def __init__(self, root: str, names: list[str], size: int) -> None:
        self.paths, self.size = [os.path.join(root, name) for name in names], size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as file:
            image = file.convert("RGB")
        rng = np.random.default_rng()
        full = np.array([[image.height, image.width]])
        top, left, height, width = crop_boxes(full, (self.size,) * 2, CropConfig(), rng.random((1, CROP_DRAWS)))[0]
        image = image.resize((self.size,) * 2, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = open_source(options.folder)
    count = min(len(source), 1024) // BATCH * BATCH
    rows = np.arange(count)
    spec = ImageSpec(3, (options.size,) * 2, "uint8", (0.0,) * 3, (1.0,) * 3)
    images = Images(source, rows, spec, CropConfig())
    pillow = PillowImages(options.folder, source.names[:count], options.size)
    found_rows = []
    for workers in options.workers:

        def ours(workers: int = workers) -> None:
            for _ in training_batches(images, start=0, batch=BATCH, batches=count // BATCH, workers=workers):
                pass

        def theirs(workers: int = workers) -> None:
            for _ in DataLoader(pillow, batch_size=BATCH, shuffle=True, num_workers=workers):
                pass

        found = medians({"unmask": ours, "pillow": theirs}, rounds=options.rounds)
        found_rows.append(
            {"images": count, "size": options.size, "workers": workers, "unmask_per_s": count / found["unmask"],
             "pillow_per_s": count / found["pillow"], "ratio": found["pillow"] / found["unmask"]}
        )  # fmt: skip
    write(f"loading-{options.size}", found_rows)


if __name__ == "__main__":
    main()
