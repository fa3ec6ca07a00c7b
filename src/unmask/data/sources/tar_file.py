"""A tar file of images, plain or compressed; members are never unpacked to disk."""

from __future__ import annotations

import lzma
import tarfile
import zlib

import numpy as np

from unmask.data import limits
from unmask.data.decode.bad_image import BadImage
from unmask.data.sources.archives import has_image_name, is_wanted, times_of_archive
from unmask.data.sources.image_files import EXTENSIONS
from unmask.data.sources.source import Opener, Source, printable
from unmask.data.sources.tar_index import Member, TarIndex, webdataset_labels
from unmask.errors import SourceError

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def _is_kept(name: str) -> bool:
    """Return whether to keep the content of this member of a compressed tar: an image, or a label of a webdataset."""
    return name.lower().endswith((*EXTENSIONS, ".cls", ".json"))


class TarSource(Source):
    """A tar file. An uncompressed tar is indexed by offset; a compressed tar is read into memory, up to 2 GiB.

    Labels are read from a webdataset's files (`000123.cls` or `000123.json` beside `000123.jpg`), or else from folder
    names.
    """

    def __init__(self, text: str) -> None:
        compressed = _is_compressed(text)
        index = TarIndex(_is_kept if compressed else None, limits.MAX_UNPACKED_BYTES)
        try:
            with tarfile.open(text) as archive:
                index.read(archive, has_image_name)
        except SourceError:
            raise
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            if not index.images:
                why = str(error).splitlines()[0]
                raise SourceError(f"{text} cannot be read as a tar file: {why}") from None
            raise SourceError(
                f"{text} is damaged or truncated after its first {index.images} images (the last is "
                f"{printable(index.last)}); copy it again, or unpack the readable part and use that folder as DATA"
            ) from None
        skipped, members = index.skipped, index.members
        names = sorted(name for name, member in members.items() if is_wanted(name, member.size, skipped))
        images = [members[name] for name in names]
        super().__init__(text, [printable(name) for name in names], [member.size for member in images])
        self.skipped = skipped
        self.changed, self.modified = times_of_archive(text, len(images))
        self.offsets = np.array([member.offset for member in images], np.int64)
        self.contents = [member.content or b"" for member in images] if compressed else None
        self._label(names, members)

    def _label(self, names: list[str], members: dict[str, Member]) -> None:
        with open(self.location, "rb") as file:

            def content(member: Member) -> bytes:
                if member.content is not None:
                    return member.content
                file.seek(member.offset)
                return file.read(member.size)

            labels, self.unlabelled, ending = webdataset_labels(names, members, content)
        self.has_label_files = bool(ending)
        if ending:
            del self.skipped[ending]  # these label files are used, not skipped
        if labels is not None:
            self.label_by(labels)
        elif not self.unlabelled:
            self.label_by_folder()

    def path(self, i: int) -> str | None:
        return self.location if self.contents is None else None

    def read(self, i: int) -> bytes:
        if self.contents is not None:
            return self.contents[i]
        try:
            with open(self.location, "rb") as file:
                file.seek(int(self.offsets[i]))
                return file.read(int(self.sizes[i]))
        except OSError as error:
            raise BadImage("VANISHED", f"the archive can no longer be read: {error.strerror}") from None


def _is_compressed(path: str) -> bool:
    """Return whether a file is compressed, judging by its first bytes and not by its extension."""
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(COMPRESSED)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None


OPENER = Opener("a .tar file", lambda text: text.lower().endswith(TARS), TarSource)
