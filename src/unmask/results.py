"""The records of evaluations that a Run keeps in its `evals` folder."""

from __future__ import annotations

from typing import Any

from unmask.run import Run

SCORE = "evals/fine-tuned.json"


def find_score(run: Run) -> dict[str, Any] | None:
    """A fine-tuned Run's count of its test images, of its last weights; None where it is still to be made."""
    results, _ = run.results("fine-tuned")
    found = results.get("fine-tuned", {})
    return found if found.get("step") == run.read("plan.json")["steps"] else None
