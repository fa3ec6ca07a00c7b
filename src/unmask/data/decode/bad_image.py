"""The exception for an image that cannot be used."""

from __future__ import annotations

from unmask.data import limits
from unmask.errors import UserError


class BadImage(UserError):
    """Raised for an image that cannot be used. code: reason code, see `decode.py`; detail: the reason in words."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


def refuse_large(height: int, width: int, channels: int) -> None:
    """Raise BadImage for an image with more pixels or values than the limits allow."""
    pixels = height * width
    if pixels > limits.MAX_PIXELS:
        raise BadImage("TOO_MANY_PIXELS", f"got {height} x {width} pixels; expected at most {limits.MAX_PIXELS}")
    if pixels * channels > limits.MAX_VALUES:
        raise BadImage(
            "TOO_MANY_PIXELS",
            f"got {height} x {width} x {channels} values; expected at most {limits.MAX_VALUES}",
        )
