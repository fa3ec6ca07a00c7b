"""A pytest plugin (`-p real_timm`) with which the tests of exports use timm itself instead of its stand-in.

timm and torchvision lie in the folder `timm` of the environment (tests/requirements-timm.txt). The operators of
torchvision are compiled for one build of torch; where they do not load, declaring their names is enough to import it,
because vision transformers use none of them.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "timm"
OPERATORS = ("nms", "qnms")


def installed() -> bool:
    return (FOLDER / "timm" / "__init__.py").is_file()


def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def pytest_configure() -> None:
    global _kept
    sys.path.append(str(FOLDER))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _kept = _declare_operators()  # the names live as long as the library
    import timm

    assert Path(timm.__file__).is_relative_to(FOLDER)
