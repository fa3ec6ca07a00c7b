"""Train lightly's MAE with Lightning, for `scaling.py`, in one process or with Lightning's DDP.

    python benchmarks/lightning_mae.py TASK        TASK is the JSON of a `scaling.Task`

The sizes, batch, precision and optimiser are those of unmask's recipe. Images are loaded as in lightly's documentation,
by its MAE transform and a DataLoader. Lightning starts the other processes itself; each writes rank-N.json.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rivals import declare_operators, make_lightly
from scaling import WARM_UP, Clocks, Task, mode_of
from torch import Tensor
from torch.utils.data import DataLoader

declare_operators()  # before Lightning, which imports torchvision if it is installed
import pytorch_lightning as lightning  # type: ignore[import-not-found]  # noqa: E402
from lightly.transforms import MAETransform  # type: ignore[import-not-found]  # noqa: E402
from torchvision.datasets import ImageFolder  # type: ignore[import-not-found]  # noqa: E402


class Module(lightning.LightningModule):
    """lightly's MAE with AdamW."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, _ = make_lightly(task.config, None)
        vit = self.model.backbone  # type: ignore[union-attr]
        if hasattr(vit, "mask_token"):
            vit.mask_token.requires_grad = False  # MAE's encoder does not use it, which DDP would reject
        self.task = task
        self.images = ImageFolder(task.data, transform=MAETransform(input_size=task.config.data.size[0]))

    def training_step(self, batch: Any, number: int) -> Tensor:
        views, _ = batch
        return self.model(views[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learned, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.images, batch_size=self.task.batch // self.task.processes, shuffle=True, drop_last=True,
            num_workers=self.task.workers, persistent_workers=self.task.workers > 0, pin_memory=self.task.gpu,
        )  # fmt: skip


class Watch(lightning.Callback):
    """Note the time of each step, and save checkpoints as `Task.modes` states."""

    def __init__(self, task: Task) -> None:
        self.task, self.clocks, self.saves = task, Clocks(task), list[dict[str, Any]]()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.clocks.before(trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        step = trainer.global_step
        self.clocks.after(step)
        if mode_of(self.task, step) == "foreground":
            path = Path(self.task.folder) / "lightning.ckpt"
            start = time.perf_counter()
            trainer.save_checkpoint(path)
            seconds = time.perf_counter() - start
            written = path.stat().st_size if trainer.is_global_zero else 0
            self.saves.append({"step": step, "pause": seconds, "write": seconds, "bytes": written, "files": 1})


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    warnings.simplefilter("ignore")
    watch = Watch(task)
    trainer = lightning.Trainer(
        max_steps=task.last_step, max_epochs=-1, devices=task.processes, accelerator="gpu" if task.gpu else "cpu",
        strategy="ddp" if task.engine == "ddp" else "auto",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        callbacks=[watch], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(task))
    assert trainer.global_step >= WARM_UP
    watch.clocks.write(trainer.global_rank, saves=watch.saves)


if __name__ == "__main__":
    main()
