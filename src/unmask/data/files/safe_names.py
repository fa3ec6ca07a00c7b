r"""Names for files made from names that others chose: one for each image, different, and safe on any file system.

A name keeps its folders and its letters where it can. Characters that Windows or a shell reads otherwise
(< > : " | ? * \ and controls) become _. Empty parts, "." and ".." are left out of folders, and a file called so,
or like a device (CON, NUL), gets an underscore before it. Long parts are cut and end in a digest. Names that would be
the same, also where case does not count, or a file where another name needs a folder, keep the image's ending or get a
number.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b

LONGEST_PART, LONGEST_NAME = 120, 600  # bytes of UTF-8: file systems take 143 to 255 a part, and 1024 in all
UNSAFE = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)


def safe_names(names: Sequence[str], suffix: str) -> list[str]:
    """A relative path for each '/'-separated name, its ending replaced by `suffix`; no two alike."""
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
    """Names to try in turn; `numbers` counts how often each stem was numbered, so that many alike stay cheap."""
    yield stem + suffix
    yield stem + ending + suffix
    flat = stem.replace("/", "_")  # for a folder whose name an earlier file has
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
    """The beginning of a part, and a digest of what it stands for, so that two long names stay two."""
    stem, ending = os.path.splitext(part)
    ending = ending if len(ending.encode()) <= 8 else ""
    digest = blake2b(whole.encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()
    return f"{stem.encode()[: LONGEST_PART - 24].decode('utf-8', 'ignore')}-{digest}{ending}"


def _above(path: str) -> list[str]:
    """Every folder above a path."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]
