"""Pre-train with Ray Train; a run goes on after the failure of a worker or a node.

    python ray_train.py DATA RUN --workers 2 [--gpu] [--recipe NAME] [--set KEY=VALUE ...]

DATA and RUN are on a disk that all nodes share. Started again, the command continues the run.
"""

import argparse
import os

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def pretrain(options: dict) -> None:
    """Called by Ray in each worker, which has the environment variables of torchrun."""
    import unmask

    unmask.pretrain(
        options["data"],
        out=options["run"],
        recipe=options["recipe"],
        settings=options["settings"],
        resume="auto",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=os.path.abspath)
    parser.add_argument("run", type=os.path.abspath)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--max-failures", type=int, default=3)
    options = vars(parser.parse_args())
    trainer = TorchTrainer(
        pretrain,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=options["workers"], use_gpu=options["gpu"]),
        run_config=RunConfig(
            storage_path=os.path.dirname(options["run"]),
            name=os.path.basename(options["run"]) + "-ray",
            failure_config=FailureConfig(max_failures=options["max_failures"]),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
