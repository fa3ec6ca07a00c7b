"""The errors whose message is all that a person needs: the command line prints them as one line.

Any other exception is a bug in this package and keeps its traceback. Messages say what was found, what is expected,
and
what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something in the input that a person can mend; the command line leaves with exit code 2."""


class ForeignError(UserError):
    """Weights of an unknown kind, or incomplete weights; the message names tensors and says what to do."""


class SourceError(UserError):
    """DATA that cannot be opened; the message says what was found, what is expected, and what to do."""


class TrainingFailed(RuntimeError):
    """Training cannot go on. The Run keeps its last good checkpoint; the command line leaves with exit code 1."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager that gives an OSError inside it the file's name, where the system gave none.

    A full disk is met in `write` or `fsync`, whose errors name no file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


class LoadingFailed(TrainingFailed):
    """Images stopped arriving: a loader worker died, or nothing has arrived for too long."""


def some(names: Iterable[str], count: int = 5, between: str = ", ") -> str:
    """The first few of many, for a sentence: 'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return between.join(names[:count]) + more
