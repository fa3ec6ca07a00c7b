"""JSON files that contain their own SHA-256, so that any change is detected when they are read.

    {
      ...,                              the object itself
      "run_id": "9f0c..." or null,      the run that the file belongs to; null in runs of earlier versions and tables
      "earlier_sha256": ["5a1e...", ...],   first digits of the digests of its earlier versions; not in all files
      "sha256": "77bd..."               of all bytes before this line, plus the closing brace
    }

The digest is computed over the bytes of the file, not over the values: a reformatted file counts as changed. Files of
earlier versions have neither `run_id` nor `sha256`. A file with only one of the two is rejected, so that a file with a
damaged key is not mistaken for a file of an earlier version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RUN_ID, EARLIER, DIGEST = "run_id", "earlier_sha256", "sha256"
_BEFORE, _AFTER = b',\n  "sha256": "', b'"\n}\n'


class ChangedJson(ValueError):
    """Raised if a file differs from what was written. The message continues a sentence whose subject is the file."""


@dataclass(frozen=True)
class Verified:
    """A JSON object and the keys that its file adds to it. sha256: None if an earlier version wrote the file."""

    value: dict[str, Any]
    run_id: str | None = None
    earlier: tuple[str, ...] = ()
    sha256: str | None = None


def dump(value: Mapping[str, Any], run_id: str | None, earlier: Sequence[str] = ()) -> tuple[bytes, str]:
    """Return the content of the file and its SHA-256."""
    assert not value.keys() & {RUN_ID, EARLIER, DIGEST}, "these keys are reserved"
    about = {RUN_ID: run_id} | ({EARLIER: list(earlier)} if earlier else {})
    body = json.dumps({**value, **about}, indent=2).encode("ascii")
    digest = hashlib.sha256(body).hexdigest()
    return body.removesuffix(b"\n}") + _BEFORE + digest.encode() + _AFTER, digest


def load(content: bytes) -> Verified:
    """Parse and verify the content of a file. Raises ChangedJson."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ChangedJson(f"cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ChangedJson(f"holds a {type(value).__name__}; expected a JSON object")
    if RUN_ID not in value and DIGEST not in value:
        return Verified(value)
    if RUN_ID not in value or DIGEST not in value:
        raise ChangedJson(f"has changed since it was written: {DIGEST if RUN_ID in value else RUN_ID} is missing")
    body, found, tail = content.rpartition(_BEFORE)
    digest = hashlib.sha256(body + b"\n}").hexdigest()
    if not found or tail != digest.encode() + _AFTER:
        raise ChangedJson("has changed since it was written (its SHA-256 differs)")
    del value[DIGEST]
    return Verified(value, value.pop(RUN_ID), tuple(value.pop(EARLIER, ())), digest)
