"""`unmask doctor`: print versions and the device, and run a short training from files to a checkpoint."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unmask.console import Console
from unmask.data.decode import decode
from unmask.engine.device import choose_device, choose_precision
from unmask.engine.pretraining import PretrainOptions, pretrain
from unmask.engine.product_library import measure_products
from unmask.engine.provenance import provenance_versions
from unmask.rng import philox

SELF_TEST = (
    "train.steps=8",
    "train.batch_size=8",
    "train.log_every=1",
    "data.size=[16,16]",
    "data.workers=0",
    "method.encoder.width=32",
    "method.encoder.depth=1",
    "method.encoder.heads=2",
    "method.decoder.width=16",
    "method.decoder.depth=1",
    "method.decoder.heads=2",
    "train.device=cpu",
)


def run_self_test(console: Console) -> tuple[bool, dict[str, Any]]:
    """Print the information for a bug report and test the installation; return (True if all tests pass, summary)."""
    device = choose_device("auto")
    precision, why = choose_precision("auto", device)
    summary: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": provenance_versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads",
        "precision": precision,
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }
    console.print(f"python {summary['python']} on {summary['platform']}")
    console.print("  ".join(f"{name} {version}" for name, version in summary["versions"].items()))
    console.print(f"device: {summary['device']}; {why}; {summary['free_disk_gib']} GiB of disk free here")
    if device == "cpu" and (rates := measure_products()) is not None:
        summary["float32_products"] = asdict(rates)
        console.print(f"float32 products: {rates.text()}")
    tests: dict[str, Callable[[], str]] = {
        "random numbers": _random_numbers,
        "decode": _decode,
        "train": _train,
    }
    summary["tests"] = {}
    for name, test in tests.items():
        start = time.perf_counter()
        try:
            outcome, good = test(), True
        except Exception as error:
            outcome, good = f"{type(error).__name__}: {error}", False
        summary["tests"][name] = {"ok": good, "outcome": outcome, "seconds": round(time.perf_counter() - start, 2)}
        console.print(f"{'ok    ' if good else 'FAILED'} {name}: {outcome} ({summary['tests'][name]['seconds']} s)")
    good = all(test["ok"] for test in summary["tests"].values())
    console.print("everything works" if good else "a test failed: please report the lines above")
    return good, summary


def _random_numbers() -> str:
    zero = np.zeros(1, np.int64)
    got = [int(word[0]) for word in philox((zero, zero, zero, zero), (0, 0))]
    assert got == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], f"Philox gives {got}"
    return "the counter-based generator returns its published values"


def _decode() -> str:
    import io

    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((256, 192)))
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    start, count = time.perf_counter(), 50
    for _ in range(count):
        image = decode.decode(file.getvalue())
    error = np.abs(image.astype(float) - smooth).mean()
    assert error < 4, f"a decoded JPEG differs by {error:.1f} levels on average"
    return f"{count / (time.perf_counter() - start):.0f} JPEG images of 256 x 192 pixels per second"


def _train() -> str:
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        rng = np.random.default_rng(0)
        for number in range(16):
            small = Image.fromarray(rng.integers(0, 255, (3, 3, 3), np.uint8))
            small.resize((20, 20), Image.Resampling.BICUBIC).save(images / f"{number}.png")
        options = PretrainOptions(recipe="mae_nano", settings=SELF_TEST)
        run = pretrain(images, options, out=Path(folder, "run"), console=SilentConsole())
        losses = [row["loss"] for row in run.metrics()]
    assert len(losses) == 8, f"losses {losses}"
    assert np.isfinite(losses).all(), f"losses {losses}"
    return "8 steps from image files to a checkpoint"


class SilentConsole(Console):
    """Console that prints nothing: plan and warnings of a training of 8 steps would mislead."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        """Do nothing."""
