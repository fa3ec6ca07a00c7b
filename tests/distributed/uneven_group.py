"""One of three processes on two hosts, the second of which has only one of them."""

import os

import pytest
import torch
from torch import nn

from unmask.engine.sharding import distribute
from unmask.engine.world import WorldError, joined

if __name__ == "__main__":
    os.environ["LOCAL_WORLD_SIZE"] = "1" if os.environ["RANK"] == "2" else "2"
    torch.set_num_threads(1)
    with joined() as world:
        distribute(nn.Linear(6, 6), "fsdp", world, precision="fp32", device="cpu")
        with pytest.raises(WorldError, match=r"got 2 in rank 0 on .*, and 1 in rank 2 on .*train\.parallel=fsdp"):
            distribute(nn.Linear(6, 6), "hsdp", world, precision="fp32", device="cpu")
