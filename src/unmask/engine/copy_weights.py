"""Check that weights fit a module, and copy them from one module into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unmask.engine.checkpoint import CheckpointError
from unmask.errors import listed


def require_fit(method: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless `weights` are exactly the tensors of `method`.

    what: name of the weights in the message.
    """
    wanted = method.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing and not extra and not any(name.startswith("encoder.") for name in missing):
        raise CheckpointError(
            f"{what} holds only the encoder: {len(missing)} other tensors ({listed(missing)}) are missing, and images "
            "cannot be reconstructed without them; use the run or the file that includes the decoder"
        )
    faults = [f"{name} is missing" for name in missing] + [f"{name} is not known" for name in extra]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(
            f"{what} does not fit the method in its config.json: {listed(faults, between='; ')}; restore config.json "
            "or the checkpoint if either file was changed or copied from another run"
        )


def graft(module: nn.Module, entries: Sequence[tuple[str, str, Mapping[str, Tensor]]]) -> None:
    """Copy all tensors under a prefix of a state dict to a prefix of `module`, for each (source prefix, target prefix,
    state dict).

    Raises CheckpointError that lists all missing, unexpected and mis-shaped tensors, before anything is copied.
    """
    own = dict(module.state_dict())
    planned: dict[str, Tensor] = {}
    faults: list[str] = []
    for source, target, state in entries:
        given = {target + name.removeprefix(source): value for name, value in state.items() if name.startswith(source)}
        wanted = {name for name in own if name.startswith(target)}
        if not given or not wanted:
            empty = (
                f"the source has no tensors under {source!r}"
                if not given
                else f"the model has no tensors under {target!r}"
            )
            raise CheckpointError(f"cannot copy {source!r} to {target!r}: {empty}")
        faults += [f"missing {name}" for name in sorted(wanted - set(given))]
        faults += [f"unexpected {name}" for name in sorted(set(given) - wanted)]
        faults += [
            f"{name} is {tuple(given[name].shape)}, expected {tuple(own[name].shape)}"
            for name in sorted(wanted & set(given))
            if given[name].shape != own[name].shape
        ]
        planned |= given
    if faults:
        raise CheckpointError(
            f"the weights do not fit: {listed(faults, between='; ')}; set method.encoder.depth, .width and .patch to "
            f"those of the weights, or use a recipe of that size"
        )
    with torch.no_grad():
        for name, value in planned.items():
            own[name].copy_(value)
