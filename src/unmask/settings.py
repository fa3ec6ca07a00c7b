"""Base class of all settings, which are immutable and typed, and reject unknown keys.

`config.py` composes the settings of a run and parses `--set KEY=VALUE`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen pydantic model that rejects unknown keys and validates its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
