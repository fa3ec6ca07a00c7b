"""A zip file of images. Each process that opens the zip needs about 550 bytes of memory per member."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from typing import Any

from unmask.data import limits
from unmask.data.decode.bad_image import BadImage
from unmask.data.files.string_table import StringTable
from unmask.data.sources.archives import is_wanted, times_of_archive
from unmask.data.sources.source import Opener, Source, printable_names
from unmask.errors import SourceError

WINDOWS = (0, 6, 10, 11, 14)  # values of `create_system`: FAT, HPFS, NTFS (two values) and VFAT


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's path with '/' separators.

    Some Windows tools separate folders by backslashes; in archives from other systems, a backslash is part of the name.
    """
    if info.create_system in WINDOWS and "/" not in info.filename:
        return info.filename.replace("\\", "/")
    return info.filename


class ZipSource(Source):
    """A zip file; members are read one at a time, and their CRC is checked."""

    def __init__(self, text: str) -> None:
        skipped: Counter[str] = Counter()
        # Stored name and size of each member; the last of several equal names is used.
        members: dict[str, tuple[str, int]] = {}
        try:
            with zipfile.ZipFile(text) as archive:
                for info in archive.infolist():
                    name = _zip_name(info)
                    if name.endswith("/"):
                        continue
                    if (info.external_attr >> 28) not in (0, 8):  # a link
                        skipped["not a regular file"] += 1
                    elif is_wanted(name, info.file_size, skipped):
                        if name in members:
                            skipped["replaced by a later member of the same name"] += 1
                        members[name] = info.filename, info.file_size
        # zipfile raises NotImplementedError for an unknown version of the format.
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise SourceError(f"{text} cannot be read as a zip file: {error}") from None
        ordered = sorted(members)
        names, self.members = StringTable(ordered), StringTable([members[name][0] for name in ordered])
        self.members = names if names.same(self.members) else self.members
        super().__init__(text, printable_names(names), [members[name][1] for name in ordered])
        self.changed, self.modified = times_of_archive(text, len(members))
        self.skipped = skipped
        self.label_by_folder()
        self._open: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def read(self, i: int) -> bytes:
        try:
            if self._open is None or self._open[0] != os.getpid():  # one handle per process
                self._open = os.getpid(), zipfile.ZipFile(self.location)
            archive = self._open[1]
            if archive.getinfo(self.members[i]).flag_bits & 1:
                raise BadImage("PERMISSION", "the zip member is encrypted; unpack the archive with its password")
            with archive.open(self.members[i]) as file:
                return file.read(limits.MAX_FILE_BYTES + 1)
        except NotImplementedError as error:  # an unknown compression
            raise BadImage("FORMAT_NOT_ALLOWED", f"zip member: {error}") from None
        except (KeyError, FileNotFoundError, PermissionError) as error:
            raise BadImage("VANISHED", f"the archive can no longer be read: {error}") from None
        except EOFError:
            raise BadImage("TRUNCATED", "the zip member ends early") from None
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, BadImage):
                raise
            raise BadImage("CORRUPT", f"zip member: {error}") from None


OPENER = Opener("a .zip file", lambda text: text.lower().endswith(".zip"), ZipSource)
