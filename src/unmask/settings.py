"""Base class of everything a person can configure: immutable, typed, and an unknown key is an error.

Not a registry and not a loader: `config.py` composes the tree and reads `--set KEY=VALUE`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys and checks its own defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
