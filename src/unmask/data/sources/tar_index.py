"""Index the members of a tar file as unpacking would: links resolved within the archive, the last of equal names.

Nothing is written to disk, and nothing outside the archive is read. A hard link is the data of the member it names;
a symbolic link likewise, where it leads to a regular member. Links to anything else are counted. Where a name occurs
twice, as after `tar -u` or `tar -r`, the last member counts.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from unmask.errors import SourceError, some

MOST_LINKS = 16  # symbolic links followed in a row
MOST_LABEL_BYTES = 1 << 16
LABEL_KEYS = ("label", "cls", "class", "class_name")  # of a webdataset's .json


@dataclass
class Member:
    """A regular member: its header, and its content if the tar is compressed."""

    header: tarfile.TarInfo
    content: bytes | None = None

    @property
    def offset(self) -> int:
        return self.header.offset_data

    @property
    def size(self) -> int:
        return self.header.size


@dataclass
class TarIndex:
    """Regular members by name, links included; `skipped` counts the others, `images` and `last` those with image names.

    keep: for compressed tars, whether to read the content of a member of this name. most: bytes that may be stored.
    """

    keep: Callable[[str], bool] | None
    most: int
    members: dict[str, Member] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    last: str = ""
    images: int = 0
    _links: dict[str, str] = field(default_factory=dict)
    _held: int = 0

    def read(self, archive: tarfile.TarFile, is_image: Callable[[str], bool]) -> None:
        """Read all headers. Raises SourceError, and what tarfile raises for a damaged file."""
        for header in archive:
            name = header.name.removeprefix("./")
            if header.isdir():
                continue
            old = self.members.pop(name, None)
            replaced = old is not None or self._links.pop(name, None) is not None
            if replaced and is_image(name):
                self.skipped["replaced by a later member of the same name"] += 1
            if header.issym():
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), header.linkname))
            elif header.islnk():
                self._hard_link(name, header)
            elif header.isfile() and not header.issparse():
                self._regular(archive, name, header, old)
            else:
                self.skipped["not a regular file"] += 1
                continue
            if is_image(name):
                self.images, self.last = self.images + 1, name
        _require_end(archive)
        self._resolve_symbolic_links(is_image)
        if self.keep is not None:
            self._read_linked(archive, is_image)

    def _regular(self, archive: tarfile.TarFile, name: str, header: tarfile.TarInfo, old: Member | None) -> None:
        member = Member(header)
        if self.keep is not None and self.keep(name):
            self._held -= old.size if old is not None and old.content is not None else 0
            self._read(archive, member)
        self.members[name] = member

    def _read(self, archive: tarfile.TarFile, member: Member) -> None:
        self._held += member.size
        if self._held > self.most:
            raise SourceError(
                f"{archive.name} unpacks to more than {self.most >> 30} GiB, and a compressed tar cannot be read at "
                "random places; unpack it, or make an uncompressed .tar"
            )
        file = archive.extractfile(member.header)
        member.content = file.read() if file else b""
        if len(member.content) < member.size:
            raise EOFError

    def _hard_link(self, name: str, header: tarfile.TarInfo) -> None:
        target = header.linkname.removeprefix("./")
        if target in self._links:  # a hard link to a symbolic link
            self._links[name] = self._links[target]
        elif target in self.members:
            self.members[name] = self.members[target]
        else:
            self.skipped["link to nothing in the archive"] += 1

    def _resolve_symbolic_links(self, is_image: Callable[[str], bool]) -> None:
        for name, target in self._links.items():
            for _ in range(MOST_LINKS):
                target = self._links.get(target, target)
            if target in self.members:
                self.members[name] = self.members[target]
            elif is_image(name):
                self.skipped["link to nothing in the archive"] += 1

    def _read_linked(self, archive: tarfile.TarFile, is_image: Callable[[str], bool]) -> None:
        """Read the targets of images that are links, in the order of the file."""
        wanted = [member for name, member in self.members.items() if member.content is None and is_image(name)]
        for member in sorted(wanted, key=lambda member: member.offset):
            if member.content is None:  # the target of several links is read once
                self._read(archive, member)


def _require_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless the archive ends with blocks of zeros: tarfile takes a damaged header for the end."""
    if archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        end = archive.fileobj.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError("it does not end as a tar does")


def sample_key(name: str) -> str:
    """Return the key of a webdataset sample: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def webdataset_labels(
    images: list[str], members: dict[str, Member], content: Callable[[Member], bytes]
) -> tuple[list[str] | None, str, str]:
    """Return (a label for each image or None, why there are none, the extension of the label files: .cls or .json).

    `why` is "" where nothing looked like labels.
    """
    for ending in (".cls", ".json"):
        labels = [_label(members.get(sample_key(name) + ending), ending, content) for name in images]
        if all(label is None for label in labels):
            continue
        if bare := [name for name, label in zip(images, labels, strict=True) if label is None]:
            why = (
                f"{len(bare)} of {len(images)} images have no {ending} file with a label beside them, for example "
                f"{some(bare, 2)}; give every image one, or none"
            )
            return None, why, ending
        return [label for label in labels if label is not None], "", ending
    return None, "", ""


def _label(member: Member | None, ending: str, content: Callable[[Member], bytes]) -> str | None:
    if member is None or member.size > MOST_LABEL_BYTES:
        return None
    try:
        text = content(member).decode("utf-8").strip()
        if ending == ".cls":
            return text or None
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = next((read[key] for key in LABEL_KEYS if key in read), None) if isinstance(read, dict) else None
    return str(found) if isinstance(found, int | str) and not isinstance(found, bool) else None
