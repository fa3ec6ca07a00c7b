"""What a scan found that a person should know before training, as sentences: for `unmask check` and for the plan."""

from __future__ import annotations

from unmask.data.scan import Scan


def findings(found: Scan) -> tuple[str, ...]:
    """One sentence for each kind of file that is not read as it stands, with the number of such files."""
    return tuple(_tolerated(found))


def _tolerated(found: Scan) -> list[str]:
    return [
        f"accepted with a warning: {count} JPEG{'s' * (count != 1)} with {fault}; no pixel is lost"
        for fault, count in found.tolerated.most_common()
    ]
