"""The two errors whose message is all that a person needs: the command line prints them as one line.

Anything else that is raised is a fault of ours and keeps its traceback. Messages say what came, what was expected, and
what to do.
"""


class UserError(ValueError):
    """Something in the input that a person can mend; the command line leaves with exit code 2."""


class TrainingFailed(RuntimeError):
    """Training cannot go on. The Run keeps its last good checkpoint; the command line leaves with exit code 1."""
