"""Read and validate JSON files of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from unmask.errors import ForeignError

MOST_BYTES = 64 << 20  # Maximum size of a JSON file or header; the largest published files have a few MiB.
LARGEST = 65_536  # Maximum of any dimension of a network, and of the sides of an image in pixels.


class Outside(BaseModel):
    """Base class of models of JSON from other programs, which ignore unknown keys."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


Parsed = TypeVar("Parsed", bound=BaseModel)


GET_AGAIN = "get the file again from where it was published, or correct it"


def checked(kind: type[Parsed], value: Any, where: str, fix: str = GET_AGAIN) -> Parsed:
    """Validate `value` with the model `kind`.

    Raises ForeignError with `where`, the key, the expected value and the `fix`.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ForeignError(
            f"{where}: got {key + ' = ' if key else ''}{shortened(first['input'])}; expected: {first['msg']}; {fix}"
        ) from None


def shortened(value: Any) -> str:
    """Return a value of a JSON file for a message, in at most 60 characters."""
    text = repr(value) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
    text = "null" if value is None else text
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ForeignError for other JSON values, and for texts longer than MOST_BYTES."""
    if len(text) > MOST_BYTES:
        raise ForeignError(f"{where}: got {len(text) >> 20} MiB of JSON; expected at most {MOST_BYTES >> 20} MiB")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ForeignError(
            f"{where} cannot be read ({type(error).__name__}); expected a JSON object; get the file again"
        ) from None
    if not isinstance(found, dict):
        raise ForeignError(
            f"{where}: got {shortened(found)}; expected a JSON object; the file is damaged: get it again"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, or {} if there is no such file. Raises ForeignError."""
    try:
        with path.open("rb") as file:
            return read_object(file.read(MOST_BYTES + 1), str(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ForeignError(
            f"{path} cannot be read ({type(error).__name__}); expected a JSON object; make the file readable"
        ) from None
