"""A glob of image files, or of parquet or tar shards."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Sequence

from unmask.data.sources.folder import walk
from unmask.data.sources.image_files import EXTENSIONS, Listing, absolute_files
from unmask.data.sources.shards import SHARD_ENDINGS, SHARDS, open_shard, open_shards_below
from unmask.data.sources.source import Opener, Source
from unmask.data.sources.system_folders import is_skipped, is_system
from unmask.errors import SourceError


def open_glob(text: str) -> Source:
    """List the files that match a glob. Raises SourceError if there are none."""
    skipped: Counter[str] = Counter()
    parts = text.replace(os.sep, "/").split("/")
    if "**" in parts:  # `glob` would follow cyclic links
        plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = "/".join(parts[:plain]) + ("/" if plain else "")

        def wanted(path: str) -> bool:
            return matches_glob(path.split("/"), parts[plain:])

        listing = Listing()
        walk(root or ".", listing, skipped, wanted)
        found = [os.path.join(root, path) for path in listing.paths]
    else:
        found = []
        for path in glob.iglob(text):
            if _in_system_folder(path, parts, skipped):
                continue
            if path.lower().endswith(EXTENSIONS) and os.path.isfile(path):
                found.append(path)
            elif os.path.isfile(path):
                skipped[os.path.splitext(path)[1].lower()] += 1
    location = text if os.path.isabs(text) else os.path.join(glob.escape(os.getcwd()), text)
    if not found and any(skipped[ending] for ending in SHARD_ENDINGS):
        paths = [os.path.abspath(path) for path in glob.glob(text, recursive=True)]
        shards = [path for path in paths if path.lower().endswith(SHARDS) and os.path.isfile(path)]
        if len(shards) == 1:
            source = open_shard(shards[0])
            source.name, source.location = text, location
            return source
        if shards:
            return open_shards_below(
                text, os.path.commonpath([os.path.dirname(path) for path in shards]), shards, location=location
            )
    if not found and not skipped:
        raise SourceError(f"{text} does not match any file; put the pattern in quotes, and use ** for any depth")
    source = absolute_files(text, sorted(found, key=os.fsencode), location=location)
    source.skipped = skipped
    source.label_by_folder()
    return source


def _in_system_folder(path: str, parts: Sequence[str], skipped: Counter[str]) -> bool:
    """Return whether a wildcard of the glob matched a system folder; folders that are named in the glob are allowed."""
    names = path.replace(os.sep, "/").split("/")
    wild = (name for name, part in zip(names, parts, strict=False) if glob.has_magic(part))
    return any(is_skipped(name, skipped) for name in wild if is_system(name))


def matches_glob(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Return whether the parts of a path match the parts of a glob, in which ** matches any number of folders."""
    if not parts or list(parts) == ["**"]:
        return bool(parts) or not names
    if parts[0] == "**":
        return any(matches_glob(names[i:], parts[1:]) for i in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and matches_glob(names[1:], parts[1:])


def _is_glob(text: str) -> bool:
    return glob.has_magic(text) and not os.path.exists(text)


OPENER = Opener("a glob", _is_glob, open_glob)
