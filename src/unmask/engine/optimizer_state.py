"""Convert the state of an optimiser to named tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.engine.checkpoint import CheckpointError


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimiser as (tensors, numbers), keyed "<parameter name>/<state name>"."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            place = tensors if isinstance(value, Tensor) else numbers
            place[f"{names[parameter]}/{key}"] = value
    return tensors, numbers


def tensors_to_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Restore exactly the state that `optimizer_to_tensors` returned.

    Raises CheckpointError if the state does not fit.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    managed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for entry, value in [*tensors.items(), *numbers.items()]:
        name, _, key = entry.rpartition("/")
        if name not in by_name or id(by_name[name]) not in managed:
            raise CheckpointError(f"the checkpoint has optimiser state for {name!r}, which this model does not train")
        parameter = by_name[name]
        if isinstance(value, Tensor):
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimiser state {entry} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}"
                )
            value = value.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = value
