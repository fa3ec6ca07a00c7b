"""The interface of an export target: how a target is declared, and what its conversion of a run returns.

Every file in `interop/targets/` declares one target, as `TARGET`. The name of the target on the command line is the
file name with dashes instead of underscores; its help text is the first line of the file's docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unmask.engine.load import Loaded
from unmask.errors import TrainingFailed, UserError


class ExportError(UserError):
    """Raised for a run that the target cannot represent, or an unusable output path; the message names alternatives."""


class ExportFailed(TrainingFailed):
    """Raised if the other library computes different outputs from the exported file, which has been removed."""


class NotChecked(Exception):
    """Raised if the other library cannot be used on this machine; the message is the reason."""


@dataclass(frozen=True)
class ExportedModel:
    """A run converted for another library, not yet written.

    what: name of the model in the other library. library: name of the library that the check needs. load: Python code
    that loads the exported file, with PATH as a placeholder. returns: a sentence that describes the outputs of the
    loaded model. write: function that writes the file or folder to a path. check: function that returns the largest
    absolute difference between the outputs of the other library and of the run for images (B, C, H, W) in the files'
    units; it raises NotChecked if the library is not installed. notes: sentences about parts of the run that were left
    out. classifies: whether the outputs of the model are class scores. whole: whether the model includes the decoder or
    head of the pre-training.
    """

    what: str
    library: str
    load: str
    returns: str
    write: Callable[[Path], None]
    check: Callable[[Path, Tensor], float]
    notes: tuple[str, ...] = ()
    classifies: bool = False
    whole: bool = False


@dataclass(frozen=True)
class ExportTarget:
    """An export target, declared as `TARGET` in a file of `interop/targets/`.

    convert: function that converts a run; it raises ExportError for a run that the target cannot represent. suffix:
    extension of the exported file, "" for a folder. library_name: `library_name` in the model card's front matter.
    normalises: whether the exported model expects images in the files' own units and normalises them itself.
    keeps_task: whether the head of a fine-tuned run is exported for every task.
    """

    convert: Callable[[Loaded], ExportedModel]
    suffix: str
    library_name: str
    normalises: bool = False
    keeps_task: bool = False
