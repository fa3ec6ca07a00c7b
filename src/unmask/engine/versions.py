"""The versions of the packages that affect results."""

from __future__ import annotations

from importlib import metadata


def provenance_versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that affect results."""
    found = {}
    for name in ("unmask", "torch", "numpy", "pillow", "simplejpeg", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
