"""Errors that users can act on: the command line prints their message as one line, without a traceback.

Any other exception is a bug in this package and keeps its traceback. A message states what was found, what was
expected, and how to correct it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Raised for input that the user can correct. The command line exits with code 2."""


class ForeignError(UserError):
    """Raised for weights that are of an unknown kind or incomplete; the message names tensors."""


class SourceError(UserError):
    """Raised if DATA cannot be opened."""


class TrainingFailed(RuntimeError):
    """Raised if training cannot continue. The run keeps its last good checkpoint, and the exit code is 1."""


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Context manager that adds the file's name to an OSError without a file name.

    `write` and `fsync` raise OSErrors without a file name when the disk is full.
    """
    try:
        yield
    except OSError as error:
        temporary = error.filename is not None and _is_temporary(Path(str(error.filename)), path)
        if (error.filename is None and error.errno is not None) or temporary:
            error.filename = str(path)
        raise


def _is_temporary(file: Path, path: Path) -> bool:
    """Return whether `file` is a hidden file or folder beside `path`, as is written before it is renamed to `path`."""
    return file.name.startswith(".") and file.parent == path.parent


class LoadingFailed(TrainingFailed):
    """Raised if the loader returns no more images, because a worker died or no image has arrived for too long."""


def listed(names: Iterable[str], count: int = 5, between: str = ", ") -> str:
    """Return the first `count` names and the number of the others, such as 'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return between.join(names[:count]) + more


def nearest(wrong: str, names: Iterable[str], aliases: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return 'did you mean a or b?', or the list of all names if none of them is similar to `wrong`.

    names: accepted names; of dotted names, such as the keys of settings, the last part is compared as well. aliases:
    names that other libraries use, with the corresponding accepted names.
    """
    names = list(names)
    leaves = {name.split(".")[-1]: name for name in names}
    leaf = wrong.split(".")[-1].lower().replace("-", "_")
    close = [name for name in (aliases or {}).get(leaf, ()) if name in names]
    close += difflib.get_close_matches(wrong, names, 3, 0.6)
    close += [leaves[near] for near in difflib.get_close_matches(leaf, leaves, 3, 0.75)]
    close = list(dict.fromkeys(close))[:3]
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
