"""The contract of an export target: what a file of `interop/targets/` declares, and what its conversion returns.

A new target is one new file there that defines `TARGET`. Its name on the command line is the name of the file, with
dashes for underscores; its help text is the first line of the file's docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unmask.engine.load import Loaded
from unmask.errors import TrainingFailed, UserError


class ExportError(UserError):
    """A run that the target cannot represent, or an output path that cannot be used; the message names alternatives."""


class ExportFailed(TrainingFailed):
    """The other library computes different outputs from the exported file, which has been removed."""


class NotChecked(Exception):
    """The other library cannot be used on this machine; the message is the reason."""


@dataclass(frozen=True)
class ExportedModel:
    """A run converted for another library, not yet written.

    what: the model in the other library's words. library: the library that the check needs. load: Python code that
    loads the file, with PATH in place of its path. returns: a sentence that describes the outputs of that code.
    write: write the file, or the folder, to a path. check: the largest absolute difference between the outputs of the
    other library and those of the run, for images (B, C, H, W) in the files' units; raises NotChecked without the
    library. notes: sentences about what was left out. classifies: the outputs are class scores. whole: includes the
    rest of the pre-training method, not the encoder alone.
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
    """What a file of `interop/targets/` declares as `TARGET`.

    convert: convert a run; raises ExportError for one that the target cannot represent. suffix: of the file that is
    written, "" for a folder. library_name: of the model card's front matter. normalises: the exported model takes
    images in the files' own units and normalises them itself. keeps_task: the exported model includes the head of a
    fine-tuned run, whatever the task.
    """

    convert: Callable[[Loaded], ExportedModel]
    suffix: str
    library_name: str
    normalises: bool = False
    keeps_task: bool = False
