"""Titles of probes in words."""

from __future__ import annotations

from typing import Any

KINDS = {
    "knn": "k nearest neighbours",
    "linear": "Linear probe",
    "attentive": "Attentive probe",
    "paper-linear": "Linear probe by the paper's protocol",
}


def probe_title(probe: dict[str, Any]) -> str:
    """What was measured, in words: the kind, the images, and whatever was asked for beyond the ordinary."""
    kind = str(probe.get("kind"))
    said = [f"{KINDS.get(kind, kind)} on {probe['data']}", f"tested on {probe['test']}"]
    if isinstance(shots := probe.get("shots"), list):
        said.append(f"{', '.join(str(number) for number in shots)} labels per class, {probe['draws']} draws each")
    elif shots is not None:
        said.append(f"{shots} label{'s' * (shots != 1)} per class")
    if probe.get("targets") is not None:
        columns = probe.get("target_columns")
        said.append(f"{probe['task']} of {', '.join(columns) + ' in ' if columns else ''}{probe['targets']}")
    if probe.get("seed"):
        said.append(f"seed {probe['seed']}")
    if probe.get("layer") is not None:
        said.append(f"layer {probe['layer']}")
    if (masks := probe.get("masks")) is not None:
        said.append(f"{masks} mask{'s' * (masks != 1)}")
    return ", ".join(said)
