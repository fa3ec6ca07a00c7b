r"""Turn the names of images into names of output files that are distinct and safe on every file system.

Folders and letters are kept where possible. Characters with a special meaning in Windows or a shell
(< > : " | ? * \ and control characters) become _. Folders named "", "." or ".." are removed. An underscore is put
before files with these names, and before device names such as CON and NUL. Long parts are shortened and end in a
digest. If two names would be equal on a case-insensitive file system, or a file would have the name of a folder, the
second name keeps the image's extension or gets a number.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b

LONGEST_PART, LONGEST_NAME = 120, 600  # bytes of UTF-8; file systems allow 143 to 255 per part, and 1024 in total
UNSAFE = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)


def safe_names(names: Sequence[str], suffix: str) -> list[str]:
    """Return a distinct relative path for each '/'-separated name, with its extension replaced by `suffix`."""
    files: set[str] = set()
    folders: set[str] = set()
    numbers: Counter[str] = Counter()
    found = []
    for name in names:
        stem, ending = os.path.splitext(_safe_path(name))
        for candidate in _candidates(stem, ending, suffix, numbers):
            key = candidate.casefold()
            above = _above(key)
            if key not in files and key not in folders and files.isdisjoint(above):
                files.add(key)
                folders.update(above)
                found.append(candidate)
                break
    return found


def _candidates(stem: str, ending: str, suffix: str, numbers: Counter[str]) -> Iterator[str]:
    """Yield the names to try, in order.

    numbers: the last number used for each stem, so that many equal names are handled quickly.
    """
    yield stem + suffix
    yield stem + ending + suffix
    flat = stem.replace("/", "_")  # used if the folder has the name of an earlier file
    while True:
        numbers[flat] += 1
        yield f"{stem}-{numbers[flat] + 1}{suffix}"
        yield f"{flat}-{numbers[flat] + 1}{suffix}"


def _safe_path(name: str) -> str:
    *above, last = name.split("/")
    folders = [_safe_part(part).rstrip(". ") for part in above if part.strip(". ")]
    path = "/".join([*folders, _safe_part(last)])
    return path if len(path.encode()) <= LONGEST_NAME else _cut(_safe_part(last), name)


def _safe_part(part: str) -> str:
    safe = UNSAFE.sub("_", part.encode("utf-8", "backslashreplace").decode())
    if not safe.strip(". "):
        safe = "_" + safe.replace(".", "_").replace(" ", "_")
    elif DEVICES.match(safe):
        safe = "_" + safe
    return safe if len(safe.encode()) <= LONGEST_PART else _cut(safe, part)


def _cut(part: str, whole: str) -> str:
    """Shorten a part and append a digest of `whole`, so that long names stay distinct."""
    stem, ending = os.path.splitext(part)
    ending = ending if len(ending.encode()) <= 8 else ""
    digest = blake2b(whole.encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()
    return f"{stem.encode()[: LONGEST_PART - 24].decode('utf-8', 'ignore')}-{digest}{ending}"


def _above(path: str) -> list[str]:
    """Return every folder above a path."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]
