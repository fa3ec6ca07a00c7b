"""The errors whose message is all that a person needs: the command line prints them as one line.

Anything else that is raised is a fault of ours and keeps its traceback. Messages say what came, what was expected, and
what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Something in the input that a person can mend; the command line leaves with exit code 2."""


class SourceError(UserError):
    """DATA that cannot be opened; the message says what came, what was expected, and what to do."""


class TrainingFailed(RuntimeError):
    """Training cannot go on. The Run keeps its last good checkpoint; the command line leaves with exit code 1."""


def some(names: Iterable[str], count: int = 5, between: str = ", ") -> str:
    """The first few of many, for a sentence: 'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return between.join(names[:count]) + more
