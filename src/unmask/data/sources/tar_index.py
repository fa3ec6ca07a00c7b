"""Index the members of a tar file, with the same result as unpacking it, but without writing to disk.

Hard links, and symbolic links that lead to a regular member, are read as the member they point to. Other links are
counted as skipped, so nothing outside the archive is read. If a name occurs twice, as after `tar -u` or `tar -r`, the
last member is used.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from unmask.errors import SourceError, listed

MOST_LINKS = 16  # maximum number of symbolic links followed in a row
MOST_LABEL_BYTES = 1 << 16
LABEL_KEYS = ("label", "cls", "class", "class_name")  # keys of the label in the .json files of a webdataset


@dataclass
class Member:
    """A regular member: its header, and its content if it was read from a compressed tar."""

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
    """Index of a tar file.

    keep: for compressed tars, whether to read the content of a member with this name, or None for uncompressed tars.
    most: maximum number of bytes to store.
    members: regular members by name, including resolved links.
    skipped: number of other members by reason.
    images, last: number of members with image names, and the name of the last one.
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
        """Read all headers. Raises SourceError, and tarfile's exceptions for a damaged file."""
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
                f"{archive.name} has more than {self.most >> 30} GiB when unpacked, the limit for compressed tars, "
                "which are read into memory; unpack it, or make an uncompressed .tar"
            )
        file = archive.extractfile(member.header)
        member.content = file.read() if file else b""
        if len(member.content) < member.size:
            raise EOFError

    def _hard_link(self, name: str, header: tarfile.TarInfo) -> None:
        target = header.linkname.removeprefix("./")
        if target in self._links:  # the target of this hard link is a symbolic link
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
        """Read the members that image links point to, in the order of the file."""
        wanted = [member for name, member in self.members.items() if member.content is None and is_image(name)]
        for member in sorted(wanted, key=lambda member: member.offset):
            if member.content is None:  # several links may point to the same member
                self._read(archive, member)


def _require_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless the archive ends with zeros, because tarfile treats a damaged header as the end."""
    if archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        end = archive.fileobj.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError("the end of the archive is missing or damaged")


def sample_key(name: str) -> str:
    """Return the key of a webdataset sample: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def webdataset_labels(
    images: list[str], members: dict[str, Member], content: Callable[[Member], bytes]
) -> tuple[list[str] | None, str, str]:
    """Return (label of each image or None, why there are no labels, extension of the label files: .cls or .json).

    The second and third value are "" if there are no label files.
    """
    for ending in (".cls", ".json"):
        labels = [_label(members.get(sample_key(name) + ending), ending, content) for name in images]
        if all(label is None for label in labels):
            continue
        if bare := [name for name, label in zip(images, labels, strict=True) if label is None]:
            why = (
                f"{len(bare)} of {len(images)} images have no {ending} file with a label beside them, for example "
                f"{listed(bare, 2)}; add labels for all images, or remove all labels"
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
