"""Open DATA: a folder tree, list file, glob, tar, zip, parquet, single files, or an embedded set.

Each kind of data is one module with an `OPENER`. `source.Source` is the common interface of all kinds.
"""

from __future__ import annotations

import difflib
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from unmask.data.sources import embedded, folder, glob_pattern, image_files, list_file, parquet_file, tar_file, zip_file
from unmask.data.sources.exclude import exclude_names
from unmask.data.sources.image_files import EXTENSIONS, open_files
from unmask.data.sources.joined import join
from unmask.data.sources.source import Opener, Source
from unmask.errors import SourceError

MOST_FILES = 1_000
FILE_OPENERS: tuple[Opener, ...] = (
    image_files.OPENER,
    list_file.OPENER,
    tar_file.OPENER,
    zip_file.OPENER,
    parquet_file.OPENER,
)
"""Kinds of regular files, recognised by the extension. A new kind needs a module and an entry here."""
OPENERS: tuple[Opener, ...] = (folder.OPENER, glob_pattern.OPENER, embedded.OPENER)
"""Kinds of data that are not a single regular file."""
WHAT_DATA_IS = "a folder, a list file (.txt, .csv), a glob, a .tar, .zip or .parquet file, or shapes or digits"


def open_source(data: str | Path | Sequence[str | Path], exclude: Sequence[str] = ()) -> Source:
    """Open DATA of any kind, or several DATA as one source.

    exclude: patterns of names to leave out, see `exclude.matcher`. Raises SourceError for data of an unknown kind or
    without any image.
    """
    texts = [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]
    if not texts:
        raise SourceError(f"got no DATA; expected {WHAT_DATA_IS}")
    began = time.time()
    if len(texts) > 1 and all(text.lower().endswith(EXTENSIONS) and os.path.isfile(text) for text in texts):
        if len(texts) > MOST_FILES:
            raise SourceError(
                f"got {len(texts)} image files; expected at most {MOST_FILES} as separate arguments: put the glob in "
                "quotes"
            )
        parts: list[Source] = [open_files(texts)]
        places = tuple(os.path.abspath(text) for text in texts)
    else:
        parts = [_open_one(text) for text in texts]
        places = tuple(part.location for part in parts)
    left = [exclude_names(part, exclude) for part in parts]
    source = left[0] if len(left) == 1 else join(left, texts)
    source.opened, source.exclude = began, tuple(exclude)
    source.data = places[0] if len(places) == 1 else places
    source.excluded = {pattern: sum(part.excluded.get(pattern, 0) for part in left) for pattern in exclude}
    return source


def _open_one(text: str) -> Source:
    opener = _opener_of(text)
    source = opener.open(text)
    if not len(source):
        seen = ", ".join(f"{number} {kind or 'without extension'}" for kind, number in source.skipped.most_common(5))
        raise SourceError(
            f"{text} contains no images{f' (but {seen})' if seen else ', it is empty'}; expected files ending in "
            f"{', '.join(EXTENSIONS)}"
        )
    return source


def _opener_of(text: str) -> Opener:
    if opener := next((one for one in OPENERS if one.opens(text)), None):
        return opener
    if not os.path.exists(text):  # unlike Path.exists, does not raise for long names and unreadable folders
        raise SourceError(f"{text} does not exist; expected {WHAT_DATA_IS}{_near(text)}")
    if not stat.S_ISREG(os.stat(text).st_mode):
        raise SourceError(f"{text} is neither a file nor a folder; expected {WHAT_DATA_IS}")
    if opener := next((one for one in FILE_OPENERS if one.opens(text)), None):
        return opener
    raise SourceError(f"{text} is a file of an unknown kind; expected {WHAT_DATA_IS}")


def _near(text: str) -> str:
    """Return similar existing names, for a misspelled `text`, as the end of a sentence."""
    folder_name, stem = os.path.dirname(text), text.partition(":")[0]
    try:
        beside = [os.path.join(folder_name, name) for name in os.listdir(folder_name or ".")]
    except (OSError, ValueError):
        beside = []
    close = difflib.get_close_matches(text, beside, 1, 0.7) + difflib.get_close_matches(stem, embedded.EMBEDDED, 1, 0.7)
    return f"; did you mean {' or '.join(close[:2])}?" if close else ""
